// Hopper: s[m, j] = scale_j * sum_k D(x)[m, k] * a[j, k], one pass over x through the copy engine.
//
// A block takes ROWS rows. Its warps split the depth: TEAM warps, of 16 * MT rows each, take every SPLITS-th
// 64 columns and have a ring of their own, of boxes of x and of `a`, that is filled far ahead: drawing a mask
// waits for no memory. Their sums meet in shared memory in a fixed order. As in shrink.cu, a thread takes the
// same permuted columns of x and of `a`, whole 16 bytes at a time, which are the elements of one Philox block.
// Options: DTYPE 1 or 2, RT ranks a block (16, 32 or 64), MT, TEAM, SPLITS, BLOCKS of a multiprocessor, DROPOUT.
constexpr int WARPS = SPLITS * TEAM;
constexpr int ROWS = 16 * MT * TEAM, NT = RT / 8, COLS = 64;
constexpr int ROOM = (BLOCKS == 1 ? 200 : 104) << 10;  // as in shrink_ring.rs
constexpr int X_BYTES = ROWS * 128, STAGE_BYTES = X_BYTES + RT * 128;
constexpr int STAGES = ROOM / (SPLITS * STAGE_BYTES);
static_assert(STAGES >= 2, "a box is to be on its way while another is read");

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) shrink_ring(
    const __grid_constant__ TensorMap x_map,  // [rows, cols], box 64 x ROWS
    const __grid_constant__ TensorMap a_map,  // [ranks, padded cols], box 64 x RT
    T* __restrict__ s,                        // [rows, lds]
    int rows, int cols, int lds, int early,   // 1: x was there before the kernel before this one
    const __grid_constant__ Scales scales, Dropout dropout) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ __align__(8) u64 barriers[2 * SPLITS * STAGES];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  int team = warp / TEAM, member = warp % TEAM;
  int row0 = blockIdx.x * ROWS, rank0 = blockIdx.y * RT;
  int boxes = (cols + COLS - 1) / COLS, count = (boxes - team + SPLITS - 1) / SPLITS;
  u32 ring = shared_address(shared) + team * STAGES * STAGE_BYTES, full = shared_address(barriers) + team * STAGES * 8, empty = full + SPLITS * STAGES * 8;
  bool loads = member == 0 && lane == 0;

  auto column = [&](int i) { return (i * SPLITS + team) * COLS; };
  auto fetch_x = [&](int i, int stage) {
    barrier_expect(full + 8 * stage, STAGE_BYTES);
    load_box(ring + stage * STAGE_BYTES, x_map, column(i), row0, full + 8 * stage);
  };
  auto fetch_a = [&](int i, int stage) { load_box(ring + stage * STAGE_BYTES + X_BYTES, a_map, column(i), rank0, full + 8 * stage); };
  if (loads) {
    for (int stage = 0; stage < STAGES; ++stage) barrier_init(full + 8 * stage, 1), barrier_init(empty + 8 * stage, TEAM);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int i = 0; i < min(count, STAGES); ++i)
      if (early) fetch_x(i, i);
      else prefetch_box(x_map, column(i), row0);
  }
  __syncthreads();
  await_previous();
  start_next();
  if (loads)
    for (int i = 0; i < min(count, STAGES); ++i) {
      if (!early) fetch_x(i, i);
      fetch_a(i, i);
    }

  float acc[MT][NT][4] = {};
  for (int i = 0, stage = 0, parity = 0; i < count; ++i) {
    u32 x = ring + stage * STAGE_BYTES + member * MT * 16 * 128, a = ring + stage * STAGE_BYTES + X_BYTES;
    barrier_wait(full + 8 * stage, parity);
    Vec xv[2][MT][2], av[2][NT];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) xv[half][m][h] = load_chunk(x, m * 16 + h * 8 + g, 2 * t + half);
#pragma unroll
      for (int n = 0; n < NT; ++n) av[half][n] = load_chunk(a, n * 8 + g, 2 * t + half);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + 8 * stage);
    if (loads && i + STAGES < count) {
      barrier_wait(empty + 8 * stage, parity);
      fetch_x(i + STAGES, stage), fetch_a(i + STAGES, stage);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        Vec &lo = xv[half][m][0], &hi = xv[half][m][1];
#if DROPOUT
        u64 index = (u64)(row0 + (member * MT + m) * 16 + g) * cols + column(i) + (2 * t + half) * 8;
        drop(dropout, index, lo);
        drop(dropout, index + (u64)8 * cols, hi);
#endif
#pragma unroll
        for (int pair = 0; pair < 4; pair += 2)
#pragma unroll
          for (int n = 0; n < NT; ++n) mma(acc[m][n], lo.w[pair], hi.w[pair], lo.w[pair + 1], hi.w[pair + 1], av[half][n].w[pair], av[half][n].w[pair + 1]);
      }
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }

  float* sums = reinterpret_cast<float*>(shared);  // [split, row, rank], where the rings were
  __syncthreads();
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<float2*>(&sums[(team * ROWS + (member * MT + m) * 16 + h * 8 + g) * RT + n * 8 + 2 * t]) = make_float2(acc[m][n][2 * h], acc[m][n][2 * h + 1]);
  __syncthreads();
  for (int at = 2 * threadIdx.x; at < ROWS * RT; at += 2 * WARPS * 32) {
    int row = row0 + at / RT, rank = rank0 + at % RT;
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int split = 0; split < SPLITS; ++split) {
      float2 v = *reinterpret_cast<float2*>(&sums[split * ROWS * RT + at]);
      sum.x += v.x, sum.y += v.y;
    }
    float scale = scales.of[min(rank / 16, 63)];
#if DROPOUT
    scale *= dropout.scale;
#endif
    if (row < rows) *reinterpret_cast<u32*>(s + (i64)row * lds + rank) = pack_halves(scale * sum.x, scale * sum.y);
  }
}
