// Hopper: s[m, j] = scale_j * sum_k D(x)[m, k] * a[j, k], one pass over x by the whole card. A block takes one unit
// of shrink_ring.cuh.
// Options: DTYPE 1 or 2, RT ranks a block (16, 32 or 64), MT, TEAM, SPLITS, BLOCKS of a multiprocessor, DROPOUT.
constexpr int ROOM = (BLOCKS == 1 ? 200 : 104) << 10;  // as in shrink_ring.rs
constexpr int STAGES = ROOM / (SPLITS * (16 * MT * TEAM + RT) * 128);
using Rings = ShrinkRing<RT, MT, TEAM, SPLITS, STAGES, DROPOUT != 0>;

extern "C" __global__ void __launch_bounds__(Rings::WARPS * 32, BLOCKS) shrink_ring(
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap a_map,
    T* __restrict__ s,                       // [rows, lds]
    int rows, int cols, int lds, int early,  // 1: x was there before the kernel before this one
    const __grid_constant__ Scales scales, Dropout dropout) {
  DYNAMIC_SHARED(shared);
  SHARED_BARRIERS(barriers, Rings::BARRIERS);
  int unit = blockIdx.x;
  Rings rings(x_map, a_map, cols, blockIdx.y * RT, shared, barriers);
  rings.init_barriers();
  if (rings.loads)
    for (int i = 0; i < rings.first(); ++i)
      if (early) rings.fetch_x(unit, i, i);
      else prefetch_box(x_map, rings.column(i), unit * Rings::ROWS);
  __syncthreads();
  await_previous();
  start_next();
  if (rings.loads)
    for (int i = 0; i < rings.first(); ++i) {
      if (!early) rings.fetch_x(unit, i, i);
      rings.fetch_a(i, i);
    }
  rings.run(unit, 1, unit + 1, reinterpret_cast<float*>(shared), dropout, [&](int row, int rank, float2 sum) {
    float scale = scales.of[min(rank / 16, 63)];
#if DROPOUT
    scale *= dropout.scale;
#endif
    if (row < rows) *reinterpret_cast<u32*>(s + (i64)row * lds + rank) = pack_halves(scale * sum.x, scale * sum.y);
  }, [](int) {});
}
