"""The operations of a layer as Triton kernels for NVIDIA GPUs (compute capability >= 8.0).

No kernel's order of sums depends on the batch:

- rows: sums of squares are formed in integers (`common.sum_of_squares`), exact in any order, so that any kernel may
  form them; everything else of a row is elementwise.
- attention: keys are cut at absolute positions into splits of fixed length; each split is summed in tiles of fixed
  length from its own start, splits are merged in order. Who computes a split, and how many queries share its tile, is
  free: a tile a query does not see adds exact zeros.
- products: one fp32 accumulator, K ascending. Own kernels keep that order by construction, the vendor's product is
  used where a certificate taken on this machine shows that it does (`vendor`), and `cuda.gemm`'s where it also is the
  faster one (`wide`).
"""
