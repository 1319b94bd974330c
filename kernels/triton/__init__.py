"""The operations of ``kernels/`` as Triton kernels, one file each.

Signatures and formulas are those of the torch implementations in the file of the same name one
folder up; every function here takes tensors that lie on one GPU (or on the CPU in Triton's
interpreter, ``TRITON_INTERPRET=1``, which is how the tests run them). Nothing here synchronises
with the host, and every sum has a fixed order, so that a run can be repeated bit by bit.

Imported only for tensors that lie on a GPU: importing Triton takes seconds, and on a machine
without a GPU nobody needs it.
"""
