// Hopper: y = x Wᵀ + b + S Bᵀ with S = s · x Aᵀ, for a few tokens, in one launch.
//
// What counts is to read W once, at full speed. A cluster takes ROWS rows of W and its two blocks share the
// depth. In a block the copy engine fills a ring of stages far ahead, and a warpgroup multiplies the rows of W
// with all tokens. Meanwhile its warps add up S of the block's depth, from the x that stands there, and in the end multiply
// it with B: what the adapter adds is a sum over the depth like the rest. Then the blocks give each other the sums of every
// other token. The adapter is read as it is kept, no other kernel packs it.
// Options: DTYPE 1 or 2, ADAPTER_F32 1 = the adapter is in f32, NT tiles of 8 tokens, RT ranks.
constexpr int CLUSTER = 2, ROWS = 64, WARPS = ROWS / 16, THREADS = (WARPS + 1) * 32;
constexpr int DEPTH = 64, TOKENS = 8 * NT;
constexpr int ADAPTER_BOXES = ADAPTER_F32 ? 2 : 1, ADAPTER_COLS = DEPTH / ADAPTER_BOXES;  // of 128 bytes
// A stage: W, x and A, of 64 columns.
constexpr int WEIGHT_BYTES = ROWS * 128, X_BYTES = TOKENS * 128, ADAPTER_BYTES = ADAPTER_BOXES * RT * 128;
constexpr int STAGE_BYTES = WEIGHT_BYTES + X_BYTES + ADAPTER_BYTES;
constexpr int MOST_STAGES = 10;  // as in decode.rs
// S in fragments of 16 tokens by 8 ranks.
constexpr int TOKEN_TILES = (NT + 1) / 2, RANK_TILES = RT / 8, S_TILES = TOKEN_TILES * RANK_TILES;

#if ADAPTER_F32
typedef float Adapter;
__device__ __forceinline__ float adapter_value(Adapter v) { return v; }
#else
typedef T Adapter;
__device__ __forceinline__ float adapter_value(Adapter v) { return to_float(v); }
#endif

// Of the 16 columns number `part` of a stage, A's ranks as right operands, rounded.
__device__ __forceinline__ void load_ranks(u32 (&ranks)[RANK_TILES][2], u32 a, int part, int lane) {
#if ADAPTER_F32
#pragma unroll
  for (int j = 0; j < RANK_TILES; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int col = part % 2 * 16 + half * 8 + 2 * (lane & 3);
      float2 v = load_floats(swizzled(a + part / 2 * (RT * 128), j * 8 + (lane >> 2), col / 4) + col % 4 * 4);
      ranks[j][half] = pack_halves(v.x, v.y);
    }
#else
#pragma unroll
  for (int j = 0; j < RANK_TILES; j += 2) {
    u32 two[4];
    ldmatrix(two, swizzled(a, j * 8 + (lane >> 4) * 8 + (lane & 7), 2 * part + (lane >> 3 & 1)));
    ranks[j][0] = two[0], ranks[j][1] = two[1], ranks[j + 1][0] = two[2], ranks[j + 1][1] = two[3];
  }
#endif
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) decode(
    const __grid_constant__ TensorMap x_map,  // [tokens, cols], box 64 x TOKENS
    const __grid_constant__ TensorMap w_map,  // [rows, cols], box 64 x ROWS
    const __grid_constant__ TensorMap a_map,  // [rank, cols], box 128 bytes x RT
    const T* __restrict__ bias,               // [rows] or null
    const Adapter* __restrict__ b,            // [rows, rank]
    T* __restrict__ y,                        // [tokens, rows]
    T* __restrict__ s,                        // [tokens, RT]
    int tokens, int rows, int cols, int rank, float scale, int stages) {
  DYNAMIC_SHARED(shared);
  SHARED_BARRIERS(barriers, 2 * MOST_STAGES);
  // From the other block: its sums of this one's tokens, a fragment for each thread, and of S.
  SHARED_ARRAY(float4, y_came, TOKEN_TILES * WARPS * 32);
  SHARED_ARRAY(float4, s_came, S_TILES * 32);
  // Where the ring was: S of every warp's depth, and of the block's as right operands.
  float4* s_parts = reinterpret_cast<float4*>(shared);                  // [warp, tile, lane]
  u32* s_all = reinterpret_cast<u32*>(s_parts + WARPS * S_TILES * 32);  // [8 tokens, 8 ranks, lane]
  u32 ring = shared_address(shared), full = shared_address(barriers), empty = full + 8 * MOST_STAGES;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  int share = blockIdx.x % CLUSTER, other = 1 - share, row0 = blockIdx.x / CLUSTER * ROWS;
  int blocks = (cols + DEPTH - 1) / DEPTH, each = (blocks + CLUSTER - 1) / CLUSTER;
  int first = share * each, count = max(0, min(each, blocks - first));
  bool saves = blockIdx.x < CLUSTER;  // all clusters have the same S

  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, WARPS);
    fence_barriers();
  }
  if (threadIdx.x == WARPS * 32) prefetch_map(x_map), prefetch_map(w_map), prefetch_map(a_map);
  __syncthreads();
  cluster_arrive_early();
  await_previous();
  start_next();

  if (warp == WARPS) {
    if (lane == 0)
      for (int i = 0, stage = 0, parity = 1; i < count; ++i) {
        u32 at = ring + stage * STAGE_BYTES, bar = full + 8 * stage;
        int col = (first + i) * DEPTH;
        barrier_wait(empty + 8 * stage, parity);
        barrier_expect(bar, STAGE_BYTES);
        load_box(at, w_map, col, row0, bar);
        load_box(at + WEIGHT_BYTES, x_map, col, 0, bar);
        for (int box = 0; box < ADAPTER_BOXES; ++box) load_box(at + WEIGHT_BYTES + X_BYTES + box * RT * 128, a_map, col + box * ADAPTER_COLS, 0, bar);
        if (++stage == stages) stage = 0, parity ^= 1;
      }
    __syncwarp();
    cluster_wait();
    cluster_sync();
    return;
  }

  // B and the bias of this thread's rows, the former as left operands.
  int row = row0 + warp * 16 + g;
  u32 up[RT / 16][4];
  auto b_at = [&](int row, int j) { return row < rows && j < rank ? adapter_value(b[(i64)row * rank + j]) : 0.f; };
#pragma unroll
  for (int j = 0; j < RT / 16; ++j)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      int of = row + (c & 1) * 8, r = j * 16 + (c >> 1) * 8 + 2 * t;
      up[j][c] = pack_halves(b_at(of, r), b_at(of, r + 1));
    }
  float offset[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) offset[h] = bias && row + 8 * h < rows ? to_float(bias[row + 8 * h]) : 0.f;

  float acc[NT][4] = {}, low[TOKEN_TILES][RANK_TILES][4] = {};
  for (int i = 0, stage = 0, parity = 0; i < count; ++i) {
    u32 weight = ring + stage * STAGE_BYTES, x = weight + WEIGHT_BYTES, a = x + X_BYTES;
    barrier_wait(full + 8 * stage, parity);
    u64 left = descriptor(weight, 16), right = descriptor(x, 16);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < DEPTH / 16; ++step) wgmma_narrow(acc, left + step * DEPTH_STEP, right + step * DEPTH_STEP, 1);
    wgmma_commit();
    // Of the 16 columns that the warp adds to S. Of 8 tokens, the other rows are not looked at.
    u32 ranks[RANK_TILES][2], in[TOKEN_TILES][4];
    load_ranks(ranks, a, warp, lane);
#pragma unroll
    for (int m = 0; m < TOKEN_TILES; ++m) ldmatrix(in[m], swizzled(x, m * 16 + (lane & 15), 2 * warp + (lane >> 4)));
    fence_loads();
#pragma unroll
    for (int m = 0; m < TOKEN_TILES; ++m)
#pragma unroll
      for (int j = 0; j < RANK_TILES; ++j) mma(low[m][j], in[m][0], in[m][1], in[m][2], in[m][3], ranks[j][0], ranks[j][1]);
    wgmma_wait<0>();
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + 8 * stage);
    if (++stage == stages) stage = 0, parity ^= 1;
  }

  auto math_sync = [] { sync_some<WARPS * 32>(1); };
  math_sync();  // nothing of the ring is read any more
#pragma unroll
  for (int m = 0; m < TOKEN_TILES; ++m)
#pragma unroll
    for (int j = 0; j < RANK_TILES; ++j) s_parts[(warp * S_TILES + m * RANK_TILES + j) * 32 + lane] = {low[m][j][0], low[m][j][1], low[m][j][2], low[m][j][3]};
  math_sync();
  cluster_wait();  // the other block is there
  constexpr int SHARES = (S_TILES + WARPS - 1) / WARPS;
  float4 own[SHARES];  // of S
#pragma unroll
  for (int i = 0; i < SHARES; ++i) {
    int tile = warp + i * WARPS, m = tile / RANK_TILES, j = tile % RANK_TILES;
    if (tile >= S_TILES) break;
    float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int from = 0; from < WARPS; ++from) {
      float4 part = s_parts[(from * S_TILES + tile) * 32 + lane];
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    own[i] = sum = {scale * sum.x, scale * sum.y, scale * sum.z, scale * sum.w};
    s_all[(2 * m * RANK_TILES + j) * 32 + lane] = pack_halves(sum.x, sum.y);
    if (NT > 1) s_all[((2 * m + 1) * RANK_TILES + j) * 32 + lane] = pack_halves(sum.z, sum.w);
    if (saves && share == 1) store_to_block(s_came + tile * 32 + lane, 0, sum);
  }
  math_sync();
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int j = 0; j < RANK_TILES; j += 2) {
      const u32* right = s_all + (n * RANK_TILES + j) * 32 + lane;
      mma(acc[n], up[j / 2][0], up[j / 2][1], up[j / 2][2], up[j / 2][3], right[0], right[32]);
    }
  // A thread has two tokens side by side: one for each block.
  auto of = [&](int n, int block, int h) { return n < NT ? block ? acc[n][2 * h + 1] : acc[n][2 * h] : 0.f; };
#pragma unroll
  for (int m = 0; m < TOKEN_TILES; ++m) store_to_block(y_came + m * WARPS * 32 + threadIdx.x, other, {of(2 * m, other, 0), of(2 * m, other, 1), of(2 * m + 1, other, 0), of(2 * m + 1, other, 1)});
  cluster_sync();
#pragma unroll
  for (int m = 0; m < TOKEN_TILES; ++m) {
    float4 came = y_came[m * WARPS * 32 + threadIdx.x];
    float theirs[2][2] = {{came.x, came.y}, {came.z, came.w}};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int token = (2 * m + n) * 8 + 2 * t + share, at = row + 8 * h;
        if (token < tokens && at < rows) y[(i64)token * rows + at] = from_float(of(2 * m + n, share, h) + theirs[n][h] + offset[h]);
      }
  }
  if (saves && share == 0) {
#pragma unroll
    for (int i = 0; i < SHARES; ++i) {
      int tile = warp + i * WARPS, token = tile / RANK_TILES * 16 + g, r = tile % RANK_TILES * 8 + 2 * t;
      if (tile >= S_TILES) break;
      float4 came = s_came[tile * 32 + lane];
      if (token < tokens) *reinterpret_cast<u32*>(s + token * RT + r) = pack_halves(own[i].x + came.x, own[i].y + came.y);
      if (token + 8 < tokens) *reinterpret_cast<u32*>(s + (token + 8) * RT + r) = pack_halves(own[i].z + came.z, own[i].w + came.w);
    }
  }
}
