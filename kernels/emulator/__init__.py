"""
An NVIDIA GPU in numpy: run kernels as Triton compiles them, without a GPU, and watch every access to memory.

    driver.py       Triton's runtime on CPU tensors: compile to PTX, launch
    ptx.py          read PTX
    machine.py      run a launch; the table of all instructions
    threads.py      the threads in step: registers, branches, barriers passed
    scalar.py       instructions on a thread's registers
    access.py       loads, stores, asynchronous copies, barriers
    warps.py        shuffles, matrices, the tensor core
    arithmetic.py   rounding, approximate instructions, the tensor core
    memory.py       bounds, races, asynchronous copies, costs
    costs.py        bank conflicts and sectors of every kernel, for kernels.report
    launches.py     what Python takes to launch them, for kernels.bench

Triton's interpreter, in which the other tests run, knows no layouts, no shared memory, no barriers and no bfloat16
products. The emulator does not know registers, timing or machine code: ptxas comes after PTX.
"""
