// Hopper: y = x Wᵀ + b + S Bᵀ with S = s · x Aᵀ, for a few tokens, in one launch.
//
// What counts is to read W once, at full speed. A cluster takes ROWS rows of W and its two blocks share the
// depth. In a block the copy engine fills a ring of stages far ahead, and a warpgroup multiplies the rows of W
// with all tokens. Meanwhile its warps add up S of the block's depth, from the x that stands there.
// In the end the blocks exchange their sums, and each adds up half of the rows. The adapter is read as it is
// kept, no other kernel packs it.
// Options: DTYPE 1 or 2, ADAPTER_F32 1 = the adapter is in f32, NT tiles of 8 tokens, RT ranks.
constexpr int CLUSTER = 2, OWN_ROWS = 32, ROWS = CLUSTER * OWN_ROWS, WARPS = ROWS / 16, THREADS = (WARPS + 1) * 32;
constexpr int DEPTH = 64, TOKENS = 8 * NT, RANK_TILES = RT / 16;
constexpr int ADAPTER_BOXES = ADAPTER_F32 ? 2 : 1, ADAPTER_COLS = DEPTH / ADAPTER_BOXES;  // of 128 bytes
// A stage: W, x and A, of 64 columns.
constexpr int WEIGHT_BYTES = ROWS * 128, X_BYTES = TOKENS * 128, ADAPTER_BYTES = ADAPTER_BOXES * RT * 128;
constexpr int STAGE_BYTES = WEIGHT_BYTES + X_BYTES + ADAPTER_BYTES;
constexpr int MOST_STAGES = 10;  // as in decode.rs
constexpr int ROW_STRIDE = OWN_ROWS + 4, B_STRIDE = OWN_ROWS + 1;  // so that few threads want one bank
constexpr int S_SIZE = RT * TOKENS;

// Fragment of 16 ranks by 16 columns of A, rounded.
#if ADAPTER_F32
typedef float Adapter;
__device__ __forceinline__ float adapter_value(Adapter v) { return v; }
__device__ __forceinline__ void load_adapter(u32 (&r)[4], u32 a, int rank, int step, int lane) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    int col = step % 2 * 16 + (c >> 1) * 8 + 2 * (lane & 3);
    float2 v;
    u32 at = swizzled(a + step / 2 * (RT * 128), rank + (c & 1) * 8 + (lane >> 2), col / 4) + col % 4 * 4;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at));
    r[c] = pack_halves(v.x, v.y);
  }
}
#else
typedef T Adapter;
__device__ __forceinline__ float adapter_value(Adapter v) { return to_float(v); }
__device__ __forceinline__ void load_adapter(u32 (&r)[4], u32 a, int rank, int step, int lane) {
  ldmatrix(r, swizzled(a, rank + (lane & 15), 2 * step + (lane >> 4)));
}
#endif

// Writes to where `there` is in another block of the cluster.
__device__ __forceinline__ void store_to(float* there, int block, float v) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.f32 [remote], %2;\n}" ::"r"(shared_address(there)), "r"(block), "f"(v)
      : "memory");
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
  __shared__ __align__(16) float s_all[S_SIZE];  // [rank, token]
  __shared__ float b_own[RT * B_STRIDE], bias_own[OWN_ROWS];  // [rank, row]
  // Where the ring was:
  float* y_parts = reinterpret_cast<float*>(shared);           // [block, token, own row]
  float* s_parts = y_parts + CLUSTER * TOKENS * ROW_STRIDE;    // [block, rank, token]
  float* s_of_warps = s_parts + CLUSTER * S_SIZE;              // [warp, rank, token]
  u32 ring = shared_address(shared), full = shared_address(barriers), empty = full + 8 * MOST_STAGES;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  int share = blockIdx.x % CLUSTER, row0 = blockIdx.x / CLUSTER * ROWS;
  int blocks = (cols + DEPTH - 1) / DEPTH, each = (blocks + CLUSTER - 1) / CLUSTER;
  int first = share * each, count = max(0, min(each, blocks - first));

  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, WARPS);
    fence_barriers();
  }
  if (threadIdx.x == WARPS * 32) prefetch_map(x_map), prefetch_map(w_map), prefetch_map(a_map);
  __syncthreads();
  await_previous();
  start_next();

  float acc[NT][4] = {}, low[RANK_TILES][NT][4] = {};
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
  } else {
    int own_row0 = row0 + share * OWN_ROWS, own_rows = min(OWN_ROWS, rows - own_row0);
    for (int i = threadIdx.x; i < own_rows * rank; i += WARPS * 32) b_own[i % rank * B_STRIDE + i / rank] = adapter_value(b[(i64)own_row0 * rank + i]);
    if ((int)threadIdx.x < own_rows) bias_own[threadIdx.x] = bias ? to_float(bias[own_row0 + threadIdx.x]) : 0.f;

    for (int i = 0, stage = 0, parity = 0; i < count; ++i) {
      u32 weight = ring + stage * STAGE_BYTES, x = weight + WEIGHT_BYTES, a = x + X_BYTES;
      barrier_wait(full + 8 * stage, parity);
      u64 left = descriptor(weight, 16), right = descriptor(x, 16);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < DEPTH / 16; ++step) wgmma_narrow(acc, left + step * DEPTH_STEP, right + step * DEPTH_STEP, 1);
      wgmma_commit();
      u32 tokens_at[(NT + 1) / 2][4];  // two tiles of tokens each; of the 16 columns that the warp adds to S
#pragma unroll
      for (int n = 0; n < NT; n += 2) ldmatrix(tokens_at[n / 2], swizzled(x, (NT == 1 ? 0 : n * 8 + (lane >> 4) * 8) + (lane & 7), 2 * warp + (lane >> 3 & 1)));
#pragma unroll
      for (int j = 0; j < RANK_TILES; ++j) {
        u32 ranks_at[4];
        load_adapter(ranks_at, a, j * 16, warp, lane);
#pragma unroll
        for (int n = 0; n < NT; ++n) mma(low[j][n], ranks_at[0], ranks_at[1], ranks_at[2], ranks_at[3], tokens_at[n / 2][n % 2 * 2], tokens_at[n / 2][n % 2 * 2 + 1]);
      }
      wgmma_wait<0>();
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * stage);
      if (++stage == stages) stage = 0, parity ^= 1;
    }
  }

  cluster_arrive();  // nothing of the ring is read any more
  __syncthreads();
  if (warp < WARPS)
#pragma unroll
    for (int j = 0; j < RANK_TILES; ++j)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          s_of_warps[warp * S_SIZE + (j * 16 + g + 8 * (c >> 1)) * TOKENS + n * 8 + 2 * t + (c & 1)] = low[j][n][c];
  __syncthreads();
  cluster_wait();
  for (int at = threadIdx.x; at < S_SIZE; at += THREADS) {
    float sum = 0.f;
#pragma unroll
    for (int other = 0; other < WARPS; ++other) sum += s_of_warps[other * S_SIZE + at];
#pragma unroll
    for (int block = 0; block < CLUSTER; ++block) store_to(s_parts + share * S_SIZE + at, block, sum);
  }
  if (warp < WARPS)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        int token = n * 8 + 2 * t + (c & 1), row = warp * 16 + g + 8 * (c >> 1);
        store_to(y_parts + (share * TOKENS + token) * ROW_STRIDE + row % OWN_ROWS, row / OWN_ROWS, acc[n][c]);
      }
  cluster_sync();
  // All that follows is in this block; sums of the blocks in order.
  for (int at = threadIdx.x; at < S_SIZE; at += THREADS) {
    float sum = 0.f;
#pragma unroll
    for (int block = 0; block < CLUSTER; ++block) sum += s_parts[block * S_SIZE + at];
    s_all[at] = scale * sum;
    int r = at / TOKENS, token = at % TOKENS;
    if (blockIdx.x == 0 && token < tokens) s[token * RT + r] = from_float(scale * sum);
  }
  __syncthreads();
  constexpr int TOGETHER = 4;  // tokens of a thread
  for (int at = threadIdx.x; at < OWN_ROWS * TOKENS / TOGETHER; at += THREADS) {
    int token = at / OWN_ROWS * TOGETHER, own = at % OWN_ROWS, row = row0 + share * OWN_ROWS + own;
    if (token >= tokens || row >= rows) continue;
    float sums[TOGETHER] = {}, add[TOGETHER] = {};
#pragma unroll
    for (int block = 0; block < CLUSTER; ++block)
#pragma unroll
      for (int i = 0; i < TOGETHER; ++i) sums[i] += y_parts[(block * TOKENS + token + i) * ROW_STRIDE + own];
#pragma unroll 4
    for (int r = 0; r < rank; ++r) {
      float b = b_own[r * B_STRIDE + own];
#pragma unroll
      for (int i = 0; i < TOGETHER; ++i) add[i] += b * s_all[r * TOKENS + token + i];
    }
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i)
      if (token + i < tokens) y[(i64)(token + i) * rows + row] = from_float(sums[i] + bias_own[own] + add[i]);
  }
}
