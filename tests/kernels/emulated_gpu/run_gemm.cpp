// gemm.cu on a CPU: 1, or 0 where all threads wait for one another.
#define LIUSHUI_PTX
#include "emulated_hopper.h"
#include "gemm.cu"
extern "C" int run_gemm(const Call* call, int blocks) { return run<Call>(multiply, *call, blocks, THREADS); }
