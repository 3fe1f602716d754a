// Hopper: one pass over z [rows, cols] for the products with rank-sized matrices that need all of it.
//
//           part[block][j, c] = sum over the rows m of a block of q[m, j] * D(z)[m, c]
// DOWN 1    s[m, j] = scale_j * sum over columns c of D(z)[m, c] * p[j, c] as well
//
// A group of blocks takes `block_rows` rows at a time and splits their columns, in chunks of 512. A
// warp has 64 columns of a chunk, for which it keeps its part of p and its partial sums in
// registers, and a ring of its own of boxes of 32 rows, filled by the copy engine. The sums of DOWN
// meet in shared memory: eight warps after every box, the blocks of a group at the end; always in
// the same order. Options: DTYPE 1 or 2, RT ranks (16, 32 or 64; both products: at most 32), DROPOUT 0,
// 1 = masked by counter, 2 = masked by bits (DOWN 0). BITS 1 = draw those of another matrix on
// the way, since the arithmetic units have time while memory has none.
constexpr int WARPS = 8, CHUNK = WARPS * BOX_COLS;
constexpr int TILES = RT / 16;
constexpr int STAGES = DOWN ? 3 : 4;
constexpr int BUFFERS = RT == 16 ? 2 : 1;                // of the warps' sums
constexpr int PITCH = RT + 8;                            // floats of a row there: no bank conflicts
constexpr int RING_BYTES = WARPS * STAGES * (BOX_BYTES + (DROPOUT == 2 ? BITS_BYTES : 0));
constexpr int BITS_WARPS = BITS ? 4 : 0;  // that draw and do nothing else
constexpr int MEET_BYTES = DOWN ? BUFFERS * WARPS * BOX_ROWS * PITCH * 4 : 0;

// A mask as bits: read by DROPOUT 2, written by BITS.
struct Bits {
  u32* keep;
  int rows, cols;
  Dropout dropout;
};

__device__ __forceinline__ void warps_sync() { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory"); }

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

extern "C" __global__ void __launch_bounds__((WARPS + BITS_WARPS) * 32, 1) sweep(
    const __grid_constant__ TensorMap z_map,  // [rows, cols], box 64 x 32
    const T* __restrict__ p,                  // [RT, ldp], zero beyond cols
    const T* __restrict__ q,                  // [rows, ldq]
    T* __restrict__ s,                        // [rows, lds]
    float* __restrict__ part,                 // [blocks, RT, cols]
    int rows, int cols, int ldp, int ldq, int lds, int block_rows, int group, const __grid_constant__ Scales scales, Dropout dropout,
    const __grid_constant__ Bits bits) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ __align__(8) u64 barriers[WARPS * STAGES];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  u32 ring = shared_address(shared) + warp * STAGES * BOX_BYTES;
  u32 ring_bits = shared_address(shared) + WARPS * STAGES * BOX_BYTES + warp * STAGES * BITS_BYTES;
  u32 full = shared_address(barriers) + warp * STAGES * 8;
  float* meet = reinterpret_cast<float*>(shared + RING_BYTES);
  float* s_sums = reinterpret_cast<float*>(shared + RING_BYTES + MEET_BYTES);                           // [block_rows, RT]
  T* q_rows = reinterpret_cast<T*>(shared + RING_BYTES + MEET_BYTES + (DOWN ? block_rows * RT * 4 : 0));  // [block_rows, RT]

  int rank = blockIdx.x % group, groups = gridDim.x / group;
  int blocks = (rows + block_rows - 1) / block_rows, strips = block_rows / BOX_ROWS, chunks = (cols + CHUNK - 1) / CHUNK;
#if BITS
  if (warp >= WARPS) {
    await_previous();
    start_next();
    int units = (bits.rows + 31) / 32 * ((bits.cols + 127) / 128), workers = gridDim.x * BITS_WARPS, unit = blockIdx.x * BITS_WARPS + warp - WARPS;
    int turns = (blocks - (int)blockIdx.x / group + groups - 1) / groups, share = ((units + workers - 1) / workers + turns - 1) / turns;
    for (int turn = 0; turn < turns; ++turn) {
      for (int i = 0; i < share && unit < units; ++i, unit += workers) store_bits(bits.dropout, bits.keep, unit, bits.rows, bits.cols, lane);
      if (group > 1) cluster_sync(), cluster_sync();  // with the others, below
    }
    return;
  }
#endif
  Place ahead = {(int)blockIdx.x / group, rank, 0};
  auto fetch = [&](int stage) {
    if (ahead.block >= blocks) return;
    if (lane == 0) {
      int col = ahead.chunk * CHUNK + warp * BOX_COLS, row = ahead.block * block_rows + ahead.strip * BOX_ROWS;
      u32 bar = full + 8 * stage;
      bool masked = DROPOUT == 2 && row < rows;
      barrier_expect(bar, BOX_BYTES + (masked ? BITS_BYTES : 0));
      load_box(ring + stage * BOX_BYTES, z_map, col, row, bar);
      if (masked) load_box_bits(ring_bits + stage * BITS_BYTES, bits.keep, row, col, cols, bar);
    }
    ahead.next(strips, chunks, rank, group, groups);
  };
  if (lane == 0) {
    for (int stage = 0; stage < STAGES; ++stage) barrier_init(full + 8 * stage, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  if (lane == 0)
    for (int strip = 0; strip < min(strips, STAGES + 1); ++strip)
      prefetch_box(z_map, ahead.chunk * CHUNK + warp * BOX_COLS, ahead.block * block_rows + strip * BOX_ROWS);
  __syncwarp();
  await_previous();
  start_next();
  if (rank < chunks)
    for (int stage = 0; stage < STAGES; ++stage) fetch(stage);

  int stage = 0, buffer = 0;
  u32 parity = 0;
  for (int block = blockIdx.x / group; block < blocks; block += groups) {
    i64 row0 = (i64)block * block_rows;
    warps_sync();  // the block before is done with its q
    constexpr int ROW_VECS = RT / 8;
    for (int at = threadIdx.x; at < block_rows * ROW_VECS; at += WARPS * 32) {
      i64 row = row0 + at / ROW_VECS;
      Vec v = {{0, 0, 0, 0}};
      if (row < rows) v = load_packed(q + row * ldq + at % ROW_VECS * 8);
      reinterpret_cast<Vec*>(q_rows)[at] = v;
    }
    warps_sync();
    for (int chunk = rank; chunk < chunks; chunk += group) {
      int col0 = chunk * CHUNK + warp * BOX_COLS;
      bool live = col0 < cols;
#if DOWN
      // Of the same permuted columns as the fragments of z: thread t has chunks 2t and 2t + 1 of eight.
      Vec p_frag[2][2 * TILES];
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < 2 * TILES; ++n) {
          p_frag[half][n] = Vec{{0, 0, 0, 0}};
          if (live) p_frag[half][n] = load_packed(p + (i64)(n * 8 + g) * ldp + col0 + (2 * t + half) * 8);
        }
#endif
      float acc[TILES][8][4] = {};
      for (int strip = 0; strip < strips; ++strip) {
        barrier_wait(full + 8 * stage, parity);
        u32 box = ring + stage * BOX_BYTES;
#if DOWN
        float down[2][2 * TILES][4] = {};
        Vec v[2][2][2];  // [16 rows][half of the row's chunks][row + 0, row + 8]
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int h = 0; h < 2; ++h) v[i][half][h] = load_chunk(box, i * 16 + h * 8 + g, 2 * t + half);
#if DROPOUT == 1
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int h = 0; h < 2; ++h)
              drop(dropout, (u64)(row0 + strip * BOX_ROWS + i * 16 + h * 8 + g) * cols + col0 + (2 * t + half) * 8, v[i][half][h]);
#endif
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int pair = 0; pair < 4; pair += 2)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
              for (int n = 0; n < 2 * TILES; ++n) {
                const Vec &lo = v[i][half][0], &hi = v[i][half][1], &b = p_frag[half][n];
                mma(down[i][n], lo.w[pair], hi.w[pair], lo.w[pair + 1], hi.w[pair + 1], b.w[pair], b.w[pair + 1]);
              }
#endif
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // 16 rows
          u32 a[TILES][4];
          u32 q_at = shared_address(q_rows) + (strip * BOX_ROWS + i * 16) * RT * 2;
#pragma unroll
          for (int j = 0; j < TILES; ++j) load_q(a[j], q_at + j * 32, RT, lane);
#if DROPOUT == 1
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
          add_across<TILES, DROPOUT == 2>(acc, a, box, i, ring_bits + stage * BITS_BYTES, col0, lane);
#endif
        }
        __syncwarp();
        fetch(stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;
#if DOWN
        float* sums = meet + (BUFFERS == 2 ? buffer : 0) * WARPS * BOX_ROWS * PITCH;
        buffer ^= 1;  // from chunk to chunk too, however many strips these have
        if (BUFFERS == 1) warps_sync();
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int n = 0; n < 2 * TILES; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h)
              *reinterpret_cast<float2*>(&sums[(warp * BOX_ROWS + i * 16 + h * 8 + g) * PITCH + n * 8 + 2 * t]) =
                  make_float2(down[i][n][2 * h], down[i][n][2 * h + 1]);
        warps_sync();
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
      float scale = DROPOUT == 2 ? bits.dropout.scale : DROPOUT ? dropout.scale : 1.f;
#if DROPOUT == 1
      // As `store_across`, but columns 2t and 2t + 1 of every eighth.
#pragma unroll
      for (int j = 0; j < TILES; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float* to = part + ((i64)block * RT + j * 16 + h * 8 + g) * cols;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            int col = col0 + (2 * t + c) * 8;
#pragma unroll
            for (int e = 0; e < 8; e += 4)
              if (col < cols)
                *reinterpret_cast<float4*>(to + col + e) = make_float4(scale * acc[j][e][2 * h + c], scale * acc[j][e + 1][2 * h + c], scale * acc[j][e + 2][2 * h + c], scale * acc[j][e + 3][2 * h + c]);
          }
        }
#else
      store_across(acc, scale, part + (i64)block * RT * cols, col0, cols, lane);
#endif
    }
#if DOWN
    // Every block of the group adds up a share of the rows.
    if (group > 1) cluster_sync(); else warps_sync();
    int share = (block_rows + group - 1) / group, end = min(block_rows, (rank + 1) * share);
    u32 mine = shared_address(s_sums);
    for (int at = rank * share * (RT / 2) + threadIdx.x; at < end * (RT / 2); at += WARPS * 32) {
      i64 row = row0 + at / (RT / 2);
      int pair = at % (RT / 2);
      float2 sum = make_float2(0.f, 0.f), theirs[8];
#pragma unroll
      for (int other = 0; other < 8; ++other) {
        theirs[other] = make_float2(0.f, 0.f);
        if (other >= group) continue;
        if (group > 1)
          asm volatile(
              "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %2, %3;\n"
              "ld.shared::cluster.v2.f32 {%0, %1}, [remote];\n}"
              : "=f"(theirs[other].x), "=f"(theirs[other].y)
              : "r"(mine + at * 8), "r"(other)
              : "memory");
        else
          theirs[other] = reinterpret_cast<float2*>(s_sums)[at];
      }
#pragma unroll
      for (int other = 0; other < 8; ++other) sum.x += theirs[other].x, sum.y += theirs[other].y;
      float scale = scales.of[pair / 8];
#if DROPOUT
      scale *= dropout.scale;
#endif
      if (row < rows) *reinterpret_cast<u32*>(s + row * lds + 2 * pair) = pack_halves(scale * sum.x, scale * sum.y);
    }
    if (group > 1) cluster_sync(); else warps_sync();
#endif
  }
}
