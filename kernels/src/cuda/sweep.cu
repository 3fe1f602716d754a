// Hopper: one pass over z [rows, cols] for the products with rank-sized matrices that need all of it.
//
// DOWN 1    s[m, j] = scale_j * sum over columns c of D(z)[m, c] * p[j, c]
// ACROSS 1  part[block][j, c] = sum over the rows m of a block of q[m, j] * D(z)[m, c]
//
// A group of blocks takes `block_rows` rows at a time and splits their columns, in chunks of 512. A
// warp has 64 columns of a chunk, for which it keeps its part of p and the sums of ACROSS in
// registers, and a ring of its own of boxes of 32 rows, filled by the copy engine. The sums of DOWN
// meet in shared memory: eight warps after every box, the blocks of a group at the end; always in
// the same order. Options: DTYPE 1 or 2, RT ranks (16, 32 or 64; both products: at most 32), DROPOUT.
constexpr int BOX_ROWS = 32, BOX_COLS = 64, BOX_BYTES = BOX_ROWS * BOX_COLS * 2;
constexpr int WARPS = 8, CHUNK = WARPS * BOX_COLS;
constexpr int TILES = RT / 16;
constexpr int STAGES = DOWN && RT > 16 ? 3 : 4;
constexpr int BUFFERS = RT == 16 ? 2 : 1;                // of the warps' sums
constexpr int PITCH = RT + 8;                            // floats of a row there: no bank conflicts
constexpr int RING_BYTES = WARPS * STAGES * BOX_BYTES;
constexpr int MEET_BYTES = DOWN ? BUFFERS * WARPS * BOX_ROWS * PITCH * 4 : 0;

struct Scales {
  float of[64];
};

__device__ __forceinline__ Vec load_chunk(u32 box, int row, int chunk) {
  Vec v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "r"(swizzled(box, row, chunk)));
  return v;
}

// Where a warp is: rows of a block, chunk by chunk, block by block.
struct Place {
  int block, chunk, strip;
  __device__ __forceinline__ void next(int strips, int chunks, int first_chunk, int group, int groups) {
    if (++strip < strips) return;
    strip = 0;
    if ((chunk += group) < chunks) return;
    chunk = first_chunk;
    block += groups;
  }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) sweep(
    const __grid_constant__ TensorMap z_map,  // [rows, cols], box 64 x 32
    const T* __restrict__ p,                  // [RT, ldp], zero beyond cols
    const T* __restrict__ q,                  // [rows, ldq]
    T* __restrict__ s,                        // [rows, lds]
    float* __restrict__ part,                 // [blocks, RT, cols]
    int rows, int cols, int ldp, int ldq, int lds, int block_rows, int group, const __grid_constant__ Scales scales, Dropout dropout) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ __align__(8) u64 barriers[WARPS * STAGES];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  u32 ring = shared_address(shared) + warp * STAGES * BOX_BYTES;
  u32 full = shared_address(barriers) + warp * STAGES * 8;
  float* meet = reinterpret_cast<float*>(shared + RING_BYTES);
  float* s_sums = reinterpret_cast<float*>(shared + RING_BYTES + MEET_BYTES);                           // [block_rows, RT]
  T* q_rows = reinterpret_cast<T*>(shared + RING_BYTES + MEET_BYTES + (DOWN ? block_rows * RT * 4 : 0));  // [block_rows, RT]

  int rank = blockIdx.x % group, groups = gridDim.x / group;
  int blocks = (rows + block_rows - 1) / block_rows, strips = block_rows / BOX_ROWS, chunks = (cols + CHUNK - 1) / CHUNK;
  Place ahead = {(int)blockIdx.x / group, rank, 0};
  auto fetch = [&](int stage) {
    if (ahead.block >= blocks) return;
    if (lane == 0) {
      barrier_expect(full + 8 * stage, BOX_BYTES);
      load_box(ring + stage * BOX_BYTES, z_map, ahead.chunk * CHUNK + warp * BOX_COLS, ahead.block * block_rows + ahead.strip * BOX_ROWS, full + 8 * stage);
    }
    ahead.next(strips, chunks, rank, group, groups);
  };
  if (lane == 0) {
    for (int stage = 0; stage < STAGES; ++stage) barrier_init(full + 8 * stage, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  await_previous();
  start_next();
  if (rank < chunks)
    for (int stage = 0; stage < STAGES; ++stage) fetch(stage);

  int stage = 0;
  u32 parity = 0;
  for (int block = blockIdx.x / group; block < blocks; block += groups) {
    i64 row0 = (i64)block * block_rows;
#if ACROSS
    __syncthreads();  // the block before is done with its q
    constexpr int ROW_VECS = RT / 8;
    for (int at = threadIdx.x; at < block_rows * ROW_VECS; at += WARPS * 32) {
      i64 row = row0 + at / ROW_VECS;
      Vec v = {{0, 0, 0, 0}};
      if (row < rows) v = load_packed(q + row * ldq + at % ROW_VECS * 8);
      reinterpret_cast<Vec*>(q_rows)[at] = v;
    }
    __syncthreads();
#endif
    for (int chunk = rank; chunk < chunks; chunk += group) {
      int col0 = chunk * CHUNK + warp * BOX_COLS;
      bool live = col0 < cols;
#if DOWN
      // Of the same permuted columns as the fragments of z: thread t has 8t .. 8t + 7 of every 32.
      Vec p_frag[2][2 * TILES];
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < 2 * TILES; ++n) {
          p_frag[half][n] = Vec{{0, 0, 0, 0}};
          if (live) p_frag[half][n] = load_packed(p + (i64)(n * 8 + g) * ldp + col0 + half * 32 + t * 8);
        }
#endif
#if ACROSS
      float acc[TILES][8][4] = {};
#endif
      for (int strip = 0; strip < strips; ++strip) {
        barrier_wait(full + 8 * stage, parity);
        u32 box = ring + stage * BOX_BYTES;
#if DOWN
        float down[2][2 * TILES][4] = {};
#endif
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // 16 rows
#if DOWN
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            Vec lo = load_chunk(box, i * 16 + g, half * 4 + t), hi = load_chunk(box, i * 16 + 8 + g, half * 4 + t);
#if DROPOUT
            u64 index = (u64)(row0 + strip * BOX_ROWS + i * 16 + g) * cols + col0 + half * 32 + t * 8;
            drop(dropout, index, lo);
            drop(dropout, index + 8 * (u64)cols, hi);
#endif
#pragma unroll
            for (int n = 0; n < 2 * TILES; ++n) {
              const Vec& b = p_frag[half][n];
              mma(down[i][n], lo.w[0], hi.w[0], lo.w[1], hi.w[1], b.w[0], b.w[1]);
              mma(down[i][n], lo.w[2], hi.w[2], lo.w[3], hi.w[3], b.w[2], b.w[3]);
            }
          }
#endif
#if ACROSS
          u32 a[TILES][4];
          u32 q_at = shared_address(q_rows) + ((strip * BOX_ROWS + i * 16 + (lane >> 4) * 8 + (lane & 7)) * RT + (lane >> 3 & 1) * 8) * 2;
#pragma unroll
          for (int j = 0; j < TILES; ++j) ldmatrix_transposed(a[j], q_at + j * 32);
#if DROPOUT
          Vec z[4];  // rows 2t, 2t + 1 and 8 on, 8 columns from 8g on
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            int row = i * 16 + 2 * t + (r & 1) + (r >> 1) * 8;
            z[r] = load_chunk(box, row, g);
            drop(dropout, (u64)(row0 + strip * BOX_ROWS + row) * cols + col0 + g * 8, z[r]);
          }
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            u32 pick = e & 1 ? 0x7632 : 0x5410;
            u32 b0 = __byte_perm(z[0].w[e >> 1], z[1].w[e >> 1], pick), b1 = __byte_perm(z[2].w[e >> 1], z[3].w[e >> 1], pick);
#pragma unroll
            for (int j = 0; j < TILES; ++j) mma(acc[j][e], a[j][0], a[j][1], a[j][2], a[j][3], b0, b1);
          }
#else
#pragma unroll
          for (int pair = 0; pair < 4; ++pair) {  // 16 columns
            u32 b[4];
            ldmatrix_transposed(b, swizzled(box, i * 16 + (lane & 15), pair * 2 + (lane >> 4)));
#pragma unroll
            for (int j = 0; j < TILES; ++j) {
              mma(acc[j][2 * pair], a[j][0], a[j][1], a[j][2], a[j][3], b[0], b[1]);
              mma(acc[j][2 * pair + 1], a[j][0], a[j][1], a[j][2], a[j][3], b[2], b[3]);
            }
          }
#endif
#endif
        }
        __syncwarp();
        fetch(stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;
#if DOWN
        float* sums = meet + (BUFFERS == 2 ? strip & 1 : 0) * WARPS * BOX_ROWS * PITCH;
        if (BUFFERS == 1) asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int n = 0; n < 2 * TILES; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h)
              *reinterpret_cast<float2*>(&sums[(warp * BOX_ROWS + i * 16 + h * 8 + g) * PITCH + n * 8 + 2 * t]) =
                  make_float2(down[i][n][2 * h], down[i][n][2 * h + 1]);
        asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
#pragma unroll
        for (int u = 0; u < BOX_ROWS * RT / 2 / (WARPS * 32); ++u) {
          int at = u * WARPS * 32 + threadIdx.x, row = at / (RT / 2), pair = at % (RT / 2);
          float2* total = reinterpret_cast<float2*>(&s_sums[(strip * BOX_ROWS + row) * RT + 2 * pair]);
          float2 sum = chunk == rank ? make_float2(0.f, 0.f) : *total;
#pragma unroll
          for (int w = 0; w < WARPS; ++w) {
            float2 v = *reinterpret_cast<float2*>(&sums[(w * BOX_ROWS + row) * PITCH + 2 * pair]);
            sum.x += v.x, sum.y += v.y;
          }
          *total = sum;
        }
#endif
      }
#if ACROSS
      // Ranks g and g + 8 of a tile; columns 2t and 2t + 1 of eight, or with dropout of every eighth.
#pragma unroll
      for (int j = 0; j < TILES; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float* to = part + ((i64)block * RT + j * 16 + h * 8 + g) * cols;
#if DROPOUT
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            int col = col0 + (2 * t + c) * 8;
#pragma unroll
            for (int e = 0; e < 8; e += 4)
              if (col < cols)
                *reinterpret_cast<float4*>(to + col + e) = make_float4(acc[j][e][2 * h + c], acc[j][e + 1][2 * h + c], acc[j][e + 2][2 * h + c], acc[j][e + 3][2 * h + c]);
          }
#else
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            int col = col0 + e * 8 + 2 * t;
            if (col < cols) *reinterpret_cast<float2*>(to + col) = make_float2(acc[j][e][2 * h], acc[j][e][2 * h + 1]);
          }
#endif
        }
#endif
    }
#if DOWN
    // Every block of the group adds up a share of the rows.
    if (group > 1) cluster_sync(); else __syncthreads();
    int share = (block_rows + group - 1) / group, end = min(block_rows, (rank + 1) * share);
    u32 mine = shared_address(s_sums);
    for (int at = rank * share * (RT / 2) + threadIdx.x; at < end * (RT / 2); at += WARPS * 32) {
      i64 row = row0 + at / (RT / 2);
      int pair = at % (RT / 2);
      float2 sum = make_float2(0.f, 0.f);
      for (int other = 0; other < min(group, chunks); ++other) {
        float2 v;
        if (group > 1) {
          asm volatile(
              "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %2, %3;\n"
              "ld.shared::cluster.v2.f32 {%0, %1}, [remote];\n}"
              : "=f"(v.x), "=f"(v.y)
              : "r"(mine + at * 8), "r"(other)
              : "memory");
        } else {
          v = reinterpret_cast<float2*>(s_sums)[at];
        }
        sum.x += v.x, sum.y += v.y;
      }
      float scale = scales.of[pair / 8];
#if DROPOUT
      scale *= dropout.scale;
#endif
      if (row < rows) *reinterpret_cast<u32*>(s + row * lds + 2 * pair) = pack_halves(scale * sum.x, scale * sum.y);
    }
    if (group > 1) cluster_sync(); else __syncthreads();
#endif
  }
}
