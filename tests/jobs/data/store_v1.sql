BEGIN TRANSACTION;
CREATE TABLE adapters (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	name VARCHAR NOT NULL, 
	int_id INTEGER NOT NULL, 
	path VARCHAR NOT NULL, 
	base_model VARCHAR NOT NULL, 
	job_id VARCHAR NOT NULL, 
	created_at INTEGER NOT NULL, 
	UNIQUE (name), 
	UNIQUE (int_id), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "adapters" VALUES(1,'ft:demo:local::0',1000000,'/srv/flexllm/jobs/ftjob-8IUn7tVSBJaZ9ySdbgZz1Ykf/adapter','demo','ftjob-n564qiaFSuc7e5V3rS8NgAuE',1795575090);
CREATE TABLE events (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR NOT NULL, 
	job_id VARCHAR NOT NULL, 
	created_at INTEGER NOT NULL, 
	level VARCHAR NOT NULL, 
	message VARCHAR NOT NULL, 
	type VARCHAR NOT NULL, 
	data JSON, 
	UNIQUE (id), 
	FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
INSERT INTO "events" VALUES(1,'ftevent-fIlY9jDS82xYNMfVYS6MP696','ftjob-n564qiaFSuc7e5V3rS8NgAuE',1795575090,'info','Fine-tuning job started','message',NULL);
INSERT INTO "events" VALUES(2,'ftevent-Z8esxD27DFPukkPvFv6x4m5u','ftjob-n564qiaFSuc7e5V3rS8NgAuE',1795575090,'info','Step 1/10: training loss=1.0000','metrics','{"step": 1, "total_steps": 10, "train_loss": 1.0}');
INSERT INTO "events" VALUES(3,'ftevent-HHOYTsflblQRz8JZ3pOUwylL','ftjob-n564qiaFSuc7e5V3rS8NgAuE',1795575090,'info','New fine-tuned model created: ft:demo:local::0','message',NULL);
INSERT INTO "events" VALUES(4,'ftevent-KUlW7RQLzAQV3Y8KG6XU8JP3','ftjob-n564qiaFSuc7e5V3rS8NgAuE',1795575090,'info','The job has successfully completed','message',NULL);
CREATE TABLE files (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR NOT NULL, 
	filename VARCHAR NOT NULL, 
	bytes INTEGER NOT NULL, 
	purpose VARCHAR NOT NULL, 
	created_at INTEGER NOT NULL, 
	UNIQUE (id)
);
INSERT INTO "files" VALUES(1,'file-zwOqKIXUj0ul0NgvvbrBRLrt','a.jsonl',32,'fine-tune',1795575090);
CREATE TABLE jobs (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR NOT NULL, 
	model VARCHAR NOT NULL, 
	status VARCHAR NOT NULL, 
	training_file VARCHAR NOT NULL, 
	suffix VARCHAR, 
	lora JSON NOT NULL, 
	training JSON NOT NULL, 
	hyperparameters JSON NOT NULL, 
	created_at INTEGER NOT NULL, 
	started_at INTEGER, 
	finished_at INTEGER, 
	trained_tokens INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	total_steps INTEGER NOT NULL, 
	adapter_name VARCHAR NOT NULL, 
	init_adapter_path VARCHAR, 
	error JSON, 
	cancel_requested BOOLEAN NOT NULL, 
	attempts INTEGER NOT NULL, 
	owner VARCHAR, 
	organization_id VARCHAR NOT NULL, 
	metadata JSON, 
	UNIQUE (id), 
	UNIQUE (adapter_name)
);
INSERT INTO "jobs" VALUES(1,'ftjob-n564qiaFSuc7e5V3rS8NgAuE','demo','succeeded','file-zwOqKIXUj0ul0NgvvbrBRLrt',NULL,'{"r": 16, "lora_alpha": 32, "use_rslora": false, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "layers_to_transform": null, "init_from": null}','{"batch_size": 1, "max_seq_length": 128, "seed": 0, "n_epochs": 3, "learning_rate": 0.0002, "learning_rate_multiplier": null, "lr_scheduler_type": "linear", "warmup_ratio": 0.03, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-08, "max_grad_norm": 1.0, "max_steps": -1, "shuffle": true, "scheduling_weight": 1.0}','{"n_epochs": "auto"}',1795575090,1795575090,1795575090,5,1,10,'ft:demo:local::0',NULL,NULL,0,1,NULL,'local','{"a": "b"}');
INSERT INTO "jobs" VALUES(2,'ftjob-8IUn7tVSBJaZ9ySdbgZz1Ykf','demo','queued','file-zwOqKIXUj0ul0NgvvbrBRLrt',NULL,'{"r": 16, "lora_alpha": 32, "use_rslora": false, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "layers_to_transform": null, "init_from": null}','{"batch_size": 1, "max_seq_length": 128, "seed": 1, "n_epochs": 3, "learning_rate": 0.0002, "learning_rate_multiplier": null, "lr_scheduler_type": "linear", "warmup_ratio": 0.03, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-08, "max_grad_norm": 1.0, "max_steps": -1, "shuffle": true, "scheduling_weight": 1.0}','{"n_epochs": "auto"}',1795575090,NULL,NULL,0,0,10,'ft:demo:local::1',NULL,NULL,0,0,NULL,'local','{"a": "b"}');
CREATE TABLE schema_version (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "schema_version" VALUES(1);
CREATE INDEX ix_jobs_training_file ON jobs (training_file);
CREATE INDEX ix_jobs_status ON jobs (status);
CREATE INDEX events_of_job ON events (job_id, seq);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('files',1);
INSERT INTO "sqlite_sequence" VALUES('jobs',2);
INSERT INTO "sqlite_sequence" VALUES('events',4);
INSERT INTO "sqlite_sequence" VALUES('adapters',1);
COMMIT;
