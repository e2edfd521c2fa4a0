"""
An NVIDIA GPU in numpy: run kernels as Triton compiles them, without a GPU, and watch every access to memory.

    driver.py       Triton's runtime on CPU tensors: compile to PTX, launch
    ptx.py          read PTX
    machine.py      run the threads of a launch, in step
    arithmetic.py   rounding, approximate instructions, the tensor core
    memory.py       bounds, races, asynchronous copies, costs
    costs.py        bank conflicts and sectors of every kernel, for kernels.report

Triton's interpreter, in which the other tests run, knows no layouts, no shared memory, no barriers and no bfloat16
products. This knows no registers, no timing and no machine code: ptxas comes after PTX.
"""
