// Hopper: rows of q = scale * D(x) · downᵀ, made by the clusters that have no tiles while the others multiply: DOWN 2.
// The rows before `first_row` are there. Options: RANK_STEPS 1, 2 or 4.
#if DOWN == 2
constexpr bool MANY = RANK_STEPS > 2;  // ranks: fewer teams have room for their sums
using Rings = ShrinkRing<16 * RANK_STEPS, MANY ? 1 : 2, MANY ? 4 : 2, MANY ? 3 : 6, RANK_STEPS == 2 ? 2 : 3, true>;
static_assert(Rings::WARPS * 32 == THREADS && Rings::BYTES + Rings::SUMS_BYTES <= SHARED_BYTES);

// By all threads of `workers` blocks, of which this is number `worker`.
__device__ __forceinline__ void make_rows(
    const TensorMap& x_map, const TensorMap& down_map, const Down& down, const Flags& flags, const Dropout& dropout, int rows, int depth, int worker, int workers,
    unsigned char* shared) {
  __shared__ __align__(8) u64 barriers[Rings::BARRIERS];
  Rings rings(x_map, down_map, depth, 0, shared, barriers);
  rings.init_barriers();
  __syncthreads();
  await_previous();
  start_next();
  // Whole tiles, which wait for all of their rows.
  auto units = [](int tile_rows) { return (tile_rows + TILE_ROWS - 1) / TILE_ROWS * (TILE_ROWS / Rings::ROWS); };
  int unit = units(down.first_row) + worker, end = units(rows);
  rings.fill(unit, workers, end);
  float scale = down.scale * dropout.scale;
  rings.run(unit, workers, end, reinterpret_cast<float*>(shared + Rings::BYTES), dropout, [&](int row, int rank, float2 sum) {
    if (row < rows) *reinterpret_cast<u32*>(down.q + (i64)row * 16 * RANK_STEPS + rank) = pack_halves(scale * sum.x, scale * sum.y);
  }, [&](int row) {
    fence_copies();
    __syncthreads();
    if (threadIdx.x == 0) count_up(flags.ready(row), Rings::ROWS / 16);
  });
}
#endif
