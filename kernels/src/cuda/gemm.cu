// Hopper: out = input · op(W) + bias + D(q · p), one rounding.
//
// forward  (BACKWARD 0): op(W) = Wᵀ, W [cols, depth];  p = Bᵀ from B [cols, rank]
// backward (BACKWARD 1): op(W) = W,  W [depth, cols];  p = A [rank, cols]
//
// A cluster of two blocks makes 256 x 256 of the output, a block 128 x 256; the blocks share the
// tiles of W by multicast. One warp loads through the tensor memory accelerator into STAGES
// buffers; two warpgroups of 64 rows each multiply from there (wgmma) with the sums in registers.
// The rank comes last: without dropout as further depth, with dropout by mma.sync into fresh
// registers that are masked before they are added. Blocks stay for several tiles, and the loads of the
// next tile run during the stores of the last. Options: DTYPE 1 or 2, BACKWARD, DROPOUT (rank at most
// 64) 1 = the mask is drawn while wgmma runs, 2 = it is read as bits, RANK_STEPS = the rank's last 1
// to 4 steps of 16.
//
// SIDE 1 (backward): tiles rarely divide by the card, so the first `side.blocks` blocks make no tiles
// but gradients of the adapter, fed by the copy engine from memory that has time to spare.
constexpr int TILE_ROWS = 128, TILE_COLS = 256, TILE_DEPTH = 64;
constexpr int STAGES = 4;
constexpr int CLUSTER = 2;
constexpr int GROUP = 8;  // cluster rows that are walked together, so that W is reused in L2
constexpr int INPUT_BYTES = TILE_ROWS * TILE_DEPTH * 2, WEIGHT_BYTES = TILE_COLS * TILE_DEPTH * 2;
constexpr int STAGE_BYTES = INPUT_BYTES + WEIGHT_BYTES;
constexpr int STORE_BYTES = 16 * 64 * 2;  // a store box: 16 rows of 128 bytes
constexpr int LOADER_REGISTERS = 40, MATH_REGISTERS = 232;

// ---- copies within a cluster -----------------------------------------------------------------
__device__ __forceinline__ void barrier_arrive_at(u32 bar, u32 block) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(bar), "r"(block) : "memory");
}
__device__ __forceinline__ void load_box_for_cluster(u32 dst, const TensorMap& map, int col, int row, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(dst),
      "l"(&map), "r"(col), "r"(row), "r"(bar), "h"((unsigned short)((1 << CLUSTER) - 1))
      : "memory");
}
__device__ __forceinline__ void store_box(const TensorMap& map, int col, int row, u32 src) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(col), "r"(row), "r"(src)
               : "memory");
}
__device__ __forceinline__ void warpgroup_sync(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// ---- wgmma ---------------------------------------------------------------------------------
// Operands stand in 128-byte rows, swizzled: 8 rows are 1024 bytes. Along the depth (K-major) the
// next 8 rows are 1024 bytes on; across it (MN-major) so are the next 8 of depth, and the next 64
// columns WEIGHT_COLS_BYTES.
constexpr u32 WEIGHT_COLS_BYTES = TILE_DEPTH * 128;
__device__ __forceinline__ u64 descriptor(u32 address, u32 leading_bytes) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)(leading_bytes >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
constexpr u32 INPUT_STEP = 32 >> 4;                          // 16 of depth, in descriptor units
constexpr u32 WEIGHT_STEP = BACKWARD ? 2048 >> 4 : 32 >> 4;  // 16 rows, or 32 bytes of a row

#define F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(d, i) F4(d, i), F4(d, i + 4), F4(d, i + 8), F4(d, i + 12)
#define F64(d, i) F16(d, i), F16(d, i + 16), F16(d, i + 32), F16(d, i + 48)
#if BACKWARD
#define TRANSPOSE_WEIGHT "1"
#else
#define TRANSPOSE_WEIGHT "0"
#endif
__device__ __forceinline__ void wgmma(float (&d)[128], u64 input, u64 weight, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." HALF_NAME "." HALF_NAME " {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
      "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
      "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127},"
      " %128, %129, p, 1, 1, 0, " TRANSPOSE_WEIGHT ";\n}"
      : F64(d, 0), F64(d, 64)
      : "l"(input), "l"(weight), "r"(accumulate));
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// ---- tiles ---------------------------------------------------------------------------------
struct Tile {
  int row, col;  // of this block's part
};

// Groups of GROUP cluster rows; within a group down the rows, then on to the next columns.
__device__ __forceinline__ Tile tile_at(int index, int cluster_rows, int cluster_cols, int block) {
  int group = index / (GROUP * cluster_cols), first = group * GROUP;
  int height = min(GROUP, cluster_rows - first), within = index - first * cluster_cols;
  return {((first + within % height) * CLUSTER + block) * TILE_ROWS, within / height * TILE_COLS};
}

// A place in the ring of stages.
struct Ring {
  int stage = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

#if DROPOUT
#if DROPOUT == 1
// Which of a thread's 128 elements are kept, drawn one block of 8 at a time during the products.
// Draw i = 2 * block + h is for row g + 8h and columns 8t .. 8t + 7 of the 32-column block `block`.
struct Keep {
  u32 bits[4] = {};
  // `first` is the Philox block of the thread's draw 0; 8 rows on are `cols` blocks on.
  __device__ __forceinline__ void draw(const Dropout& dropout, u64 first, int i, int cols) {
    Draws draws = philox(dropout, first + (i >> 1) * 4 + (i & 1) * cols);
    u32 byte = 0, least = dropout.threshold << 16;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (draws.w[w] << 16 >= least) byte |= 1 << (2 * w);
      if (draws.w[w] >= least) byte |= 2 << (2 * w);
    }
    // A shift register of 16 bytes: after the last draw, draw 0 is the lowest byte.
    bits[0] = __funnelshift_r(bits[0], bits[1], 8);
    bits[1] = __funnelshift_r(bits[1], bits[2], 8);
    bits[2] = __funnelshift_r(bits[2], bits[3], 8);
    bits[3] = bits[3] >> 8 | byte << 24;
  }
};
constexpr int DRAWS = TILE_COLS / 32 * 2;
#else
// The same from memory: words of 128 columns for rows g and g + 8.
struct Keep {
  u32 bits[2][2];
  __device__ __forceinline__ void load(const u32* keep, int row0, int rows, int col0, int cols, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        int row = row0 + h * 8 + (lane >> 2), col = col0 + c * 128;
        bits[h][c] = 0;
        if (row < rows && col < cols) asm volatile("ld.global.u32 %0, [%1];" : "=r"(bits[h][c]) : "l"(bits_at(keep, row, col, cols) + (lane & 3)));
      }
  }
};
#endif

// d += D(q p) for the 16 rows of a warp; q and p stand in a stage.
__device__ __forceinline__ void add_masked_rank(float (&d)[128], u32 q, u32 p, const Keep& keep, float scale, int lane) {
#pragma unroll
  for (int wide = 0; wide < TILE_COLS / 64; ++wide) {  // 64 columns: 8 tiles of 8
    float low[8][4] = {};
#pragma unroll 1
    for (int k = 0; k < RANK_STEPS; ++k) {
      u32 a[4], b[4][4];
      ldmatrix(a, swizzled(q, lane & 15, 2 * k + (lane >> 4)));
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
#if BACKWARD
        // rows are ranks: lanes 0-15 address 16 ranks of columns n .. n+7, lanes 16-31 of n+8 .. n+15
        ldmatrix_transposed(b[pair], swizzled(p + wide * WEIGHT_COLS_BYTES, k * 16 + (lane & 15), pair * 2 + (lane >> 4)));
#else
        // rows are columns of the output: lanes 0-7 address 8 ranks of n .. n+7, 8-15 the next 8, 16-31 of n+8 ..
        ldmatrix(b[pair], swizzled(p, wide * 64 + pair * 16 + (lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
#endif
      }
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        mma(low[2 * pair], a[0], a[1], a[2], a[3], b[pair][0], b[pair][1]);
        mma(low[2 * pair + 1], a[0], a[1], a[2], a[3], b[pair][2], b[pair][3]);
      }
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      int tile = wide * 8 + n;
#if DROPOUT == 1
      // Thread n of the quad drew for every fourth tile from n on; bits 2t and 2t + 1 of its byte are
      // for this thread.
      u32 word = __shfl_sync(0xffffffffu, keep.bits[tile >> 3], n & 3, 4) >> (16 * (tile >> 2 & 1) + 2 * (lane & 3));
#endif
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float v = low[n][c] * scale;
#if DROPOUT == 1
        bool kept = word >> (8 * (c >> 1) + (c & 1)) & 1;
#else
        bool kept = keep.bits[c >> 1][tile >> 4] >> (2 * (tile & 15) + (c & 1)) & 1;
#endif
        if (kept) d[tile * 4 + c] += v;
      }
    }
  }
}
#endif

// Work beside the product: part[segment][rank, cols] = qᵀ · z over the rows of a segment, for up to
// two z [rows, cols]. With DROPOUT the second z is masked like the output.
struct Side {
  const T *q0, *q1;      // [rows, rank], row strides ldq0 and ldq1
  float *part0, *part1;  // [segments, rank, cols]
  int ldq0, ldq1;
  int cols0, cols1;  // 0: no such product
  int segment_rows, blocks;
};

#if SIDE
constexpr int SIDE_WARPS = 8, SIDE_STAGES = 4, SIDE_CHUNK = SIDE_WARPS * BOX_COLS;
constexpr int SIDE_RANK = 16 * RANK_STEPS, SIDE_RING_BYTES = SIDE_WARPS * SIDE_STAGES * BOX_BYTES;
constexpr int SIDE_BITS_BYTES = DROPOUT == 2 ? SIDE_WARPS * SIDE_STAGES * BITS_BYTES : 0;

// A block takes segments of rows, whose q it keeps in shared memory, and every column of z in chunks
// of 512: 1024 bytes of 32 rows at a time, because single lines would cost the memory too much. A
// warp has 64 columns and a ring of boxes of its own.
template <bool MASKED>
__device__ __forceinline__ void side_work(const TensorMap& z, const T* q, float* part, int ldq, int cols, int rows, const u32* kept, float scale, const Side& side, unsigned char* shared, u32 full, int& stage, u32& parity) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  u32 ring = shared_address(shared) + warp * SIDE_STAGES * BOX_BYTES;
  u32 ring_bits = shared_address(shared) + SIDE_RING_BYTES + warp * SIDE_STAGES * BITS_BYTES;
  T* q_rows = reinterpret_cast<T*>(shared + SIDE_RING_BYTES + SIDE_BITS_BYTES);  // [segment_rows, SIDE_RANK]
  int segments = (rows + side.segment_rows - 1) / side.segment_rows, chunks = (cols + SIDE_CHUNK - 1) / SIDE_CHUNK;
  for (int segment = blockIdx.x; segment < segments; segment += side.blocks) {
    int row0 = segment * side.segment_rows, strips = (min(rows - row0, side.segment_rows) + BOX_ROWS - 1) / BOX_ROWS;
    int count = strips * chunks, ahead = 0, ahead_strip = 0, ahead_chunk = 0;
    auto fetch = [&](int stage) {
      if (ahead++ >= count) return;
      if (lane == 0) {
        int col = ahead_chunk * SIDE_CHUNK + warp * BOX_COLS, row = row0 + ahead_strip * BOX_ROWS;
        u32 bar = full + 8 * stage;
        barrier_expect(bar, BOX_BYTES + (MASKED ? BITS_BYTES : 0));
        load_box(ring + stage * BOX_BYTES, z, col, row, bar);
        if (MASKED) load_box_bits(ring_bits + stage * BITS_BYTES, kept, row, col, cols, bar);
      }
      if (++ahead_strip == strips) ahead_strip = 0, ++ahead_chunk;
    };
    for (int i = 0, to = stage; i < SIDE_STAGES; ++i, to = (to + 1) % SIDE_STAGES) fetch(to);
    asm volatile("bar.sync 1, %0;" ::"n"(SIDE_WARPS * 32) : "memory");  // the segment before is done with its q
    constexpr int ROW_VECS = SIDE_RANK / 8;
    for (int at = threadIdx.x; at < strips * BOX_ROWS * ROW_VECS; at += SIDE_WARPS * 32) {
      int row = row0 + at / ROW_VECS;
      Vec v = {{0, 0, 0, 0}};
      if (row < rows) v = load_packed(q + (i64)row * ldq + at % ROW_VECS * 8);
      reinterpret_cast<Vec*>(q_rows)[at] = v;
    }
    asm volatile("bar.sync 1, %0;" ::"n"(SIDE_WARPS * 32) : "memory");
    for (int chunk = 0; chunk < chunks; ++chunk) {
      float acc[RANK_STEPS][8][4] = {};
      u32 q_at = shared_address(q_rows);
      int col0 = chunk * SIDE_CHUNK + warp * BOX_COLS;
      for (int strip = 0; strip < strips; ++strip, q_at += BOX_ROWS * SIDE_RANK * 2) {
        barrier_wait(full + 8 * stage, parity);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          u32 a[RANK_STEPS][4];
#pragma unroll
          for (int j = 0; j < RANK_STEPS; ++j) load_q(a[j], q_at + i * 16 * SIDE_RANK * 2 + j * 32, SIDE_RANK, lane);
          add_across<RANK_STEPS, MASKED>(acc, a, ring + stage * BOX_BYTES, i, ring_bits + stage * BITS_BYTES, col0, lane);
        }
        __syncwarp();
        fetch(stage);
        if (++stage == SIDE_STAGES) stage = 0, parity ^= 1;
      }
      store_across(acc, scale, part + (i64)segment * SIDE_RANK * cols, col0, cols, lane);
    }
  }
}
#endif

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1) gemm(
    const __grid_constant__ TensorMap input_map,   // [rows, depth], box 64 x 128
    const __grid_constant__ TensorMap weight_map,  // box 64 x 128, or 64 x 64 backward
    const __grid_constant__ TensorMap q_map,       // [rows, rank], box 64 x 128
    const __grid_constant__ TensorMap p_map,       // as weight_map
    const __grid_constant__ TensorMap out_map,     // [rows, cols], box 64 x 16
    const __grid_constant__ TensorMap side0_map,   // z of the first side product, box 64 x 32
    const __grid_constant__ TensorMap side1_map,   // and of the second
    const T* __restrict__ bias,                    // [cols] or null
    int rows, int cols, int depth, int rank, Dropout dropout,
    const u32* kept,  // DROPOUT 2: bits of [rows, cols]
    Side side) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  u32 stages = shared_address(shared), stores = stages + STAGES * STAGE_BYTES;
  u32 full = shared_address(barriers), empty = full + STAGES * 8;

#if SIDE
  if (blockIdx.x < side.blocks) {
    if (threadIdx.x >= SIDE_WARPS * 32) return;
    __shared__ __align__(8) u64 side_barriers[SIDE_WARPS * SIDE_STAGES];
    u32 ring_full = shared_address(side_barriers) + threadIdx.x / 32 * SIDE_STAGES * 8;
    if (threadIdx.x % 32 == 0) {
      for (int stage = 0; stage < SIDE_STAGES; ++stage) barrier_init(ring_full + 8 * stage, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    await_previous();
    start_next();
    int stage = 0;
    u32 parity = 0;
    if (side.cols0) side_work<false>(side0_map, side.q0, side.part0, side.ldq0, side.cols0, rows, kept, 1.f, side, shared, ring_full, stage, parity);
    if (side.cols1) side_work<DROPOUT == 2>(side1_map, side.q1, side.part1, side.ldq1, side.cols1, rows, kept, DROPOUT ? dropout.scale : 1.f, side, shared, ring_full, stage, parity);
    return;
  }
#endif

  u32 block;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(block));
  int side_blocks = side.blocks;
  int cluster = (blockIdx.x - side_blocks) / CLUSTER, clusters = (gridDim.x - side_blocks) / CLUSTER;
  int cluster_rows = (rows + CLUSTER * TILE_ROWS - 1) / (CLUSTER * TILE_ROWS), cluster_cols = (cols + TILE_COLS - 1) / TILE_COLS;
  int tiles = cluster_rows * cluster_cols;
  int depth_blocks = (depth + TILE_DEPTH - 1) / TILE_DEPTH, rank_blocks = (rank + TILE_DEPTH - 1) / TILE_DEPTH;
  // The last block of the rank is the remainder; those before it are further depth.
  int full_blocks = depth_blocks + rank_blocks - 1;
  int warpgroup = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 2 * CLUSTER);  // both math warpgroups of both blocks
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();

  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LOADER_REGISTERS));
    if (threadIdx.x == 0) {
      Ring ring;
      bool first = true;
      for (int index = cluster; index < tiles; index += clusters) {
        Tile tile = tile_at(index, cluster_rows, cluster_cols, block);
        for (int k = 0; k < depth_blocks + rank_blocks; ++k, ring.next()) {
          bool low = k >= depth_blocks;
          if (low && first) {
            // Only q comes from the kernel before this one: the base product need not await it. No
            // tile is stored before its rank has arrived, so the stores are behind this too.
            await_previous();
            start_next();
            first = false;
          }
          const TensorMap& left = low ? q_map : input_map;
          const TensorMap& right = low ? p_map : weight_map;
          int at = (low ? k - depth_blocks : k) * TILE_DEPTH;
          u32 bar = full + 8 * ring.stage, dst = stages + ring.stage * STAGE_BYTES;
          barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
          barrier_expect(bar, STAGE_BYTES);
          load_box(dst, left, at, tile.row, bar);
          // Each block fetches half of the tile of W for both.
          dst += INPUT_BYTES + block * (WEIGHT_BYTES / CLUSTER);
#if BACKWARD
          load_box_for_cluster(dst, right, tile.col + block * 128, at, bar);
          load_box_for_cluster(dst + WEIGHT_COLS_BYTES, right, tile.col + block * 128 + 64, at, bar);
#else
          load_box_for_cluster(dst, right, at, tile.col + block * 128, bar);
#endif
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MATH_REGISTERS));
    int math = warpgroup - 1, thread = threadIdx.x % 128, lane = thread & 31, warp = thread / 32;
    u32 store = stores + (math * 4 + warp) * 2 * STORE_BYTES;
    Ring ring;
    u32 out[TILE_COLS / 4];  // the tile before, rounded
    Tile last = {0, 0};
    bool waiting = false;
    // In boxes of 64 columns by the warp's 16 rows, swizzled: one is filled while the copy engine
    // reads the other, and no warp waits for another.
    auto store_half = [&](int half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int box = half * 2 + i;
        u32 to = store + i * STORE_BYTES;
        if (lane == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
        __syncwarp();
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {  // 16 columns
          const u32* v = &out[box * 16 + pair * 4];
          asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(swizzled(to, lane & 15, pair * 2 + (lane >> 4))),
                       "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                       : "memory");
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (lane == 0) {
          store_box(out_map, last.col + box * 64, last.row + math * 64 + warp * 16, to);
          asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
      }
    };
    for (int index = cluster; index < tiles; index += clusters) {
      Tile tile = tile_at(index, cluster_rows, cluster_cols, block);
      float d[128];
      int previous = 0;
#if DROPOUT
      Keep keep;
#endif
#if DROPOUT == 1
      u64 first_draw = (u64)((i64)(tile.row + math * 64 + warp * 16 + (lane >> 2)) * cols + tile.col + (lane & 3) * 8) >> 3;
#endif
      for (int k = 0; k < full_blocks; ++k, ring.next()) {
        u32 at = stages + ring.stage * STAGE_BYTES;
        u64 input = descriptor(at + math * (INPUT_BYTES / 2), 16);
        u64 weight = descriptor(at + INPUT_BYTES, BACKWARD ? WEIGHT_COLS_BYTES : 16);
        barrier_wait(full + 8 * ring.stage, ring.parity);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < TILE_DEPTH / 16; ++step)
          wgmma(d, input + step * INPUT_STEP, weight + step * WEIGHT_STEP, k > 0 || step > 0);
        wgmma_commit();
        if (waiting) {
          if (k == 0) store_half(0);
          if (k == 1 || full_blocks == 1) store_half(1), waiting = false;
        }
#if DROPOUT == 1
        if (k >= 2 && k < DRAWS + 2) keep.draw(dropout, first_draw, k - 2, cols);
#elif DROPOUT == 2
        if (k == full_blocks / 2) {
          await_previous();  // of use in the first tile: the bits come from the kernel before this one
          keep.load(kept, tile.row + math * 64 + warp * 16, rows, tile.col, cols, lane);
        }
#endif
        wgmma_wait<1>();
        if (k > 0 && thread < CLUSTER) barrier_arrive_at(empty + 8 * previous, thread);
        previous = ring.stage;
      }
#if DROPOUT
      wgmma_wait<0>();
      if (thread < CLUSTER) barrier_arrive_at(empty + 8 * previous, thread);
      {
        u32 at = stages + ring.stage * STAGE_BYTES;
#if DROPOUT == 1
        for (int i = max(full_blocks - 2, 0); i < DRAWS; ++i) keep.draw(dropout, first_draw, i, cols);
#endif
        barrier_wait(full + 8 * ring.stage, ring.parity);
        add_masked_rank(d, at + (math * 64 + warp * 16) * 128, at + INPUT_BYTES, keep, dropout.scale, lane);
        warpgroup_sync(math);
        if (thread < CLUSTER) barrier_arrive_at(empty + 8 * ring.stage, thread);
        ring.next();
      }
#else
      {
        u32 at = stages + ring.stage * STAGE_BYTES;
        u64 input = descriptor(at + math * (INPUT_BYTES / 2), 16);
        u64 weight = descriptor(at + INPUT_BYTES, BACKWARD ? WEIGHT_COLS_BYTES : 16);
        barrier_wait(full + 8 * ring.stage, ring.parity);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < RANK_STEPS; ++step) wgmma(d, input + step * INPUT_STEP, weight + step * WEIGHT_STEP, 1);
        wgmma_commit();
        wgmma_wait<1>();
        if (thread < CLUSTER) barrier_arrive_at(empty + 8 * previous, thread);
        previous = ring.stage;
        ring.next();
      }
      wgmma_wait<0>();
      if (thread < CLUSTER) barrier_arrive_at(empty + 8 * previous, thread);
#endif

      // Rounded at once, which frees the sums for the next tile; stored while that multiplies.
#pragma unroll
      for (int tile8 = 0; tile8 < TILE_COLS / 8; ++tile8) {
        float* v = &d[tile8 * 4];
        if (bias) {
          int col = tile.col + tile8 * 8 + 2 * (lane & 3);
          u32 two = col < cols ? *reinterpret_cast<const u32*>(bias + col) : 0;
          float lo = to_float((T)(two & 0xffff)), hi = to_float((T)(two >> 16));
          v[0] += lo, v[1] += hi, v[2] += lo, v[3] += hi;
        }
        out[tile8 * 2] = pack_halves(v[0], v[1]);
        out[tile8 * 2 + 1] = pack_halves(v[2], v[3]);
      }
      last = tile;
      waiting = true;
    }
    if (waiting) store_half(0), store_half(1);
    if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  // A block must not leave while its partner still signals it or loads for it.
  cluster_sync();
}
