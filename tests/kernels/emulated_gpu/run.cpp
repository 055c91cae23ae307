// decoder.cu on a CPU: 1, or 0 where all threads wait for one another.
#define LIUSHUI_PTX
#include "emulation.h"
#include "decoder.cu"
extern "C" int run_decoder(const Step* step, int count) { return run<Step>(decode_layers, *step, count, THREADS + 32); }
