// prefill.cu on a CPU: 1, or 0 where all threads wait for one another.
#define LIUSHUI_PTX
#define DOWN 1
#define BN 64
#include "emulated_hopper.h"
#include "prefill.cu"
extern "C" int run_prefill(const Call* call, int blocks) { return run<Call>(prefill, *call, blocks, THREADS); }
