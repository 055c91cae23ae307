// All layers of a decoder for one new token of a few sequences, in one launch.
//
// A block per multiprocessor. One warp of each streams the block's share of all weights, and the keys and values that it
// attends to, layer after layer, through a ring in shared memory; it never waits for the arithmetic but for room, and holds
// back while mail is awaited. Eight warps compute, four of them multiply by weights (wgmma). The parts of a layer hand their results on in words that carry their tag (`Mail`): a reader polls the
// very words it needs, so that no barrier over the grid is needed:
//
//   norm + q, k, v | head norms, rotation, cache, attention | output + residual | norm + gate, up, SiLU | down + residual
//
// A weight tile is 8 rows; its sum over K is one chain of k16 products in ascending order, as in all other products of
// liushui, and norms and attention follow the Triton kernels operation by operation: the bits are theirs.
//
// Compile-time: HIDDEN, INNER, HEADS, KV_HEADS, DIM, LAYERS, BLOCK (tokens in a block of the cache), ROWS (most
// sequences, 1 to 8), SLOTS (of the ring), QK_NORM. And, 0 unless set:
//   GUARD     1: a wait of seconds ends in an error
//   TRACE     1: clock of each part of layer 5

#include "attention.cuh"

DEVICE void compute(Shared& s, const Step& step) {
  Place taken{0, 0};
  const int rows = live(step);
  const u32 base = fresh32(step.counter + 1) << 7;
  const auto nothing = [](int, int) { return 0u; };
  Norm before(s.layers[0].input_norm);
#pragma unroll 1
  for (int i = 0; i < LAYERS; i++) {
    const Layer& layer = s.layers[i];
    const Mail mail(step, i);
    const u32 tag = base + i + 1;
    const auto old = [&](int token, int column) { return fresh32(step.stream + (i64)token * HIDDEN + column); };
    const auto add = [&](u64* to, int token, int column, const float(&v)[2], u32 was) {
      const i64 at = (i64)token * HIDDEN + column;
      const u32 word = pair(__fadd_rn(widen(narrow(v[0])), low_half(was)), __fadd_rn(widen(narrow(v[1])), high_half(was)));
      *reinterpret_cast<u32*>(step.stream + at) = word;
      send(to + at / 2, word, tag);
    };
    const Trace trace{i == 5};
    trace.mark(0);
    const Product<1, QKV, HIDDEN> qkv(s);
    qkv.await(taken);
    before.take(s, i == 0 ? step.stream : nullptr, Mail(step, i + 1).out, tag - 1, step.eps, rows, trace, 10);
    trace.mark(1);
    taken = qkv.run(taken, rows, nothing, [&](int token, int column, const float(&v)[1][2], u32) {
      send(mail.qkv + ((i64)token * QKV + column) / 2, pair(v[0][0], v[0][1]), tag);
    });
    trace.mark(2);
#pragma unroll 1
    for (int index = Item::first(step); index >= 0; index -= (int)gridDim.x) {
      const Item item(step, index);
      if (!item.exists()) continue;
      Attend(s, step, layer, mail, item, taken, tag).run(trace);
      taken = taken.far_on(2 * item.units());
    }
    trace.mark(3);
    const Norm between(layer.mlp_norm);
    const Product<1, HIDDEN, QUERY> output(s);
    output.await(taken);
    take<QUERY>(s, mail.mixed, tag, rows);
    trace.mark(4);
    taken = output.run(taken, rows, old, [&](int token, int column, const float(&v)[1][2], u32 was) {
      add(mail.middle, token, column, v[0], was);
    });
    trace.mark(5);
    const Product<2, INNER, HIDDEN> gate_up(s);
    gate_up.await(taken);
    between.take(s, nullptr, mail.middle, tag, step.eps, rows, trace, 11);
    trace.mark(6);
    taken = gate_up.run(taken, rows, nothing, [&](int token, int column, const float(&v)[2][2], u32) {
      float y[2];
#pragma unroll
      for (int j = 0; j < 2; j++) y[j] = __fmul_rn(silu(widen(narrow(v[0][j]))), widen(narrow(v[1][j])));
      send(mail.inner + ((i64)token * INNER + column) / 2, pair(y[0], y[1]), tag);
    });
    trace.mark(7);
    before = Norm(s.layers[min(i + 1, LAYERS - 1)].input_norm);
    const Product<1, HIDDEN, INNER> down(s);
    down.await(taken);
    take<INNER>(s, mail.inner, tag, rows);
    trace.mark(8);
    taken = down.run(taken, rows, old, [&](int token, int column, const float(&v)[1][2], u32 was) {
      add(mail.out, token, column, v[0], was);
    });
    trace.mark(9);
  }
  sync();
  if (threadIdx.x == 0 && atomicAdd(step.counter + 2, 1) == gridDim.x - 1)
    step.counter[0] = step.counter[2] = 0, step.counter[1]++;
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) decode_layers(const __grid_constant__ Step step) {
  Shared& s = *reinterpret_cast<Shared*>(shared_memory());
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < SLOTS; i++) ring_init(shared_address(&s.full[i]), 1), ring_init(shared_address(&s.empty[i]), WARPS);
    s.zero = make_uint4(0, 0, 0, 0);
    s.waiting = 0;
    ring_ready();
  }
  const u64* layers = reinterpret_cast<const u64*>(step.layers);
  for (int i = threadIdx.x; i < LAYERS * (int)(sizeof(Layer) / 8); i += THREADS + 32) reinterpret_cast<u64*>(s.layers)[i] = layers[i];
  __syncthreads();
  if (threadIdx.x >= THREADS) stream_weights(s, step);
  else compute(s, step);
}
extern "C" __device__ const int shared_bytes = SHARED_BYTES;
