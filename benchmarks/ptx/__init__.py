"""The compiled kernels, executed on the CPU: `python -m benchmarks.ptx`.

What Triton compiles for an NVIDIA GPU is PTX, the assembly of a documented virtual machine. This
package executes it: the threads of some blocks (CTAs) go through the program in lockstep, one numpy
operation an instruction, and every access to memory is checked on the way. So the code that would
run on a GPU is compared with the reference, not the Python that it was compiled from.

From the text to a result:

    parse         PTX text -> statements
    numbers       what the bits of a register mean
    operands      an operand -> a function that reads or writes it
    instructions  a statement -> a function that executes it
    program       statements -> basic blocks of such functions
    races         who touched what, and the faults that were found
    memory        global memory: the tensors of a launch
    shared        shared memory, asynchronous copies, operands of wgmma
    ctas          some CTAs in lockstep: registers, shared memory, barriers
    launch        a grid of CTAs through a program
    kernels       a launch of the library -> PTX for a chip -> the above
    comparing     what a case draws, and how far a result may be from the reference
    families      a family of kernels each, launched and compared
    cases         the list of what is run
    mutations     compiled code broken on purpose, to see what is noticed

It needs numpy alone up to `launch`. It is no GPU: it knows nothing of time, and executes what PTX
says, not what the assembler makes of it.
"""
