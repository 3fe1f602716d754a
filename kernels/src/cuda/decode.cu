// Hopper: y = x Wᵀ + b + S Bᵀ with S = s · x Aᵀ, for a few tokens, in one launch.
//
// What counts is to read W once, at full speed: a block takes 32 rows of W, which it multiplies with
// all tokens, its warps sharing the depth. S is tiny, but every block needs it: the blocks of a cluster
// share its depth and exchange their sums. The adapter is read as it is kept, no other kernel packs it.
// Options: DTYPE 1 or 2, ADAPTER_F32 1 = the adapter is in f32, NT tiles of 8 tokens, RT ranks.
constexpr int WARPS = 8, CLUSTER = 4, MT = 2, ROWS = 16 * MT;
constexpr int SPAN = 4 * VEC;  // columns of one step
constexpr int STEPS = 2;
constexpr int AHEAD = 16;  // turns of the loop over W that are prefetched
constexpr int TOKENS = 8 * NT, RANK_TILES = RT / 16;
constexpr int CHUNK = 64 / WARPS;  // tiles whose sums meet at a time

#if ADAPTER_F32
typedef float Adapter;
__device__ __forceinline__ float adapter_value(Adapter v) { return v; }
#else
typedef T Adapter;
__device__ __forceinline__ float adapter_value(Adapter v) { return to_float(v); }
#endif

// Eight neighbours of a row of the adapter, rounded.
__device__ __forceinline__ Vec load_adapter(const Adapter* row, int col, int cols, bool live) {
  Vec v = {{0, 0, 0, 0}};
  if (live && col < cols) {
#if ADAPTER_F32
    float4 a = *reinterpret_cast<const float4*>(row + col), b = *reinterpret_cast<const float4*>(row + col + 4);
    v = {{pack_halves(a.x, a.y), pack_halves(a.z, a.w), pack_halves(b.x, b.y), pack_halves(b.z, b.w)}};
#else
    v = *reinterpret_cast<const Vec*>(row + col);
#endif
  }
  return v;
}

__device__ __forceinline__ float load_from(u32 address, int block) {
  float v;
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [remote];\n}"
      : "=f"(v)
      : "r"(address), "r"(block)
      : "memory");
  return v;
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(WARPS * 32, 1) decode(
    const T* __restrict__ x,        // [tokens, cols], row stride ldx
    const T* __restrict__ w,        // [rows, cols]
    const T* __restrict__ bias,     // [rows] or null
    const Adapter* __restrict__ a,  // [rank, cols]
    const Adapter* __restrict__ b,  // [rows, rank]
    T* __restrict__ y,              // [tokens, rows]
    T* __restrict__ s,              // [tokens, RT]
    int tokens, i64 ldx, int rows, int cols, int rank, float scale) {
  __shared__ float sums[WARPS * CHUNK * 128];
  __shared__ float s_mine[RT * TOKENS], s_all[RT * TOKENS];  // [rank, token]
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  int row0 = blockIdx.x * ROWS, share = blockIdx.x % CLUSTER;

  const T* w_row[2 * MT];
  bool w_live[2 * MT];
#pragma unroll
  for (int h = 0; h < 2 * MT; ++h) {
    int row = row0 + h * 8 + g;
    w_live[h] = row < rows;
    w_row[h] = w + (i64)(w_live[h] ? row : 0) * cols;
  }
  Vec wv[STEPS][2 * MT];
  auto fetch = [&](int k) {
#pragma unroll
    for (int u = 0; u < STEPS; ++u)
#pragma unroll
      for (int h = 0; h < 2 * MT; ++h) wv[u][h] = load_row(w_row[h], k + u * SPAN + t * VEC, cols, w_live[h]);
  };
  for (int k = warp * SPAN * STEPS, turn = 0; k < cols && turn < AHEAD; k += WARPS * SPAN * STEPS, ++turn)
#pragma unroll
    for (int u = 0; u < STEPS; ++u)
#pragma unroll
      for (int h = 0; h < 2 * MT; ++h)
        if (k + u * SPAN + t * VEC < cols) prefetch(w_row[h] + k + u * SPAN + t * VEC);
  await_previous();
  start_next();
  fetch(warp * SPAN * STEPS);

  const T* x_row[NT];
  bool x_live[NT];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    x_live[n] = n * 8 + g < tokens;
    x_row[n] = x + (x_live[n] ? n * 8 + g : 0) * ldx;
  }

  // S of this block's share of the depth.
  {
    int each = (cols + CLUSTER * SPAN - 1) / (CLUSTER * SPAN) * SPAN, end = min(cols, (share + 1) * each);
    float acc[RANK_TILES][NT][4] = {};
    for (int k = share * each + warp * SPAN; k < end; k += WARPS * SPAN) {
      int col = k + t * VEC;
      Vec av[RANK_TILES][2], xv[NT];
#pragma unroll
      for (int j = 0; j < RANK_TILES; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          int r = j * 16 + h * 8 + g;
          av[j][h] = load_adapter(a + (i64)(r < rank ? r : 0) * cols, col, cols, r < rank);
        }
#pragma unroll
      for (int n = 0; n < NT; ++n) xv[n] = load_row(x_row[n], col, cols, x_live[n]);
#pragma unroll
      for (int pair = 0; pair < 4; pair += 2)
#pragma unroll
        for (int j = 0; j < RANK_TILES; ++j)
#pragma unroll
          for (int n = 0; n < NT; ++n)
            mma(acc[j][n], av[j][0].w[pair], av[j][1].w[pair], av[j][0].w[pair + 1], av[j][1].w[pair + 1], xv[n].w[pair], xv[n].w[pair + 1]);
    }
#pragma unroll
    for (int j = 0; j < RANK_TILES; ++j)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[warp * RT * TOKENS + (j * 16 + g + 8 * (c >> 1)) * TOKENS + n * 8 + 2 * t + (c & 1)] = acc[j][n][c];
    __syncthreads();
    for (int at = threadIdx.x; at < RT * TOKENS; at += WARPS * 32) {
      float sum = 0.f;
#pragma unroll
      for (int other = 0; other < WARPS; ++other) sum += sums[other * RT * TOKENS + at];
      s_mine[at] = sum;
    }
  }
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");

  float acc[MT][NT][4] = {};
  for (int k = warp * SPAN * STEPS; k < cols; k += WARPS * SPAN * STEPS) {
    Vec now[STEPS][2 * MT], xv[STEPS][NT];
#pragma unroll
    for (int u = 0; u < STEPS; ++u)
#pragma unroll
      for (int h = 0; h < 2 * MT; ++h) now[u][h] = wv[u][h];
    fetch(k + WARPS * SPAN * STEPS);
#pragma unroll
    for (int u = 0; u < STEPS; ++u)
#pragma unroll
      for (int n = 0; n < NT; ++n) xv[u][n] = load_row(x_row[n], k + u * SPAN + t * VEC, cols, x_live[n]);
#pragma unroll
    for (int u = 0; u < STEPS; ++u)
#pragma unroll
      for (int pair = 0; pair < 4; pair += 2)
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            const Vec &lo = now[u][2 * i], &hi = now[u][2 * i + 1], &v = xv[u][n];
            mma(acc[i][n], lo.w[pair], hi.w[pair], lo.w[pair + 1], hi.w[pair + 1], v.w[pair], v.w[pair + 1]);
          }
  }

  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  for (int at = threadIdx.x; at < RT * TOKENS; at += WARPS * 32) {
    u32 address = (u32)__cvta_generic_to_shared(s_mine + at);
    float parts[CLUSTER], sum = 0.f;
#pragma unroll
    for (int other = 0; other < CLUSTER; ++other) parts[other] = load_from(address, other);
#pragma unroll
    for (int other = 0; other < CLUSTER; ++other) sum += parts[other];
    s_all[at] = scale * sum;
    int r = at / TOKENS, token = at % TOKENS;
    if (blockIdx.x == 0 && token < tokens) s[token * RT + r] = from_float(scale * sum);
  }
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");

  constexpr int TILES = MT * NT;
#pragma unroll
  for (int first = 0; first < TILES; first += CHUNK) {
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < CHUNK; ++tile)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        int at = first + tile;
        if (at < TILES) sums[(warp * CHUNK + tile) * 128 + (2 * t + (c & 1)) * 16 + g + 8 * (c >> 1)] = acc[at / NT][at % NT][c];
      }
    __syncthreads();
    for (int at = threadIdx.x; at < CHUNK * 128; at += WARPS * 32) {
      int tile = first + at / 128, token = tile % NT * 8 + at % 128 / 16, row = row0 + tile / NT * 16 + at % 16;
      if (tile < TILES && token < tokens && row < rows) {
        float sum = bias ? to_float(bias[row]) : 0.f;
#pragma unroll
        for (int other = 0; other < WARPS; ++other) sum += sums[(other * CHUNK + at / 128) * 128 + at % 128];
        const Adapter* b_row = b + (i64)row * rank;
        float low = 0.f;
        for (int r = 0; r < rank; ++r) low += adapter_value(b_row[r]) * s_all[r * TOKENS + token];
        y[(i64)token * rows + row] = from_float(sum + low);
      }
    }
  }
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // until no block reads another's sums
}
