// Hopper: out = input · op(W) + bias + D(q · p), one rounding.
//
// forward  (BACKWARD 0): op(W) = Wᵀ, W [cols, depth];  p = Bᵀ from B [cols, rank]
// backward (BACKWARD 1): op(W) = W,  W [depth, cols];  p = A [rank, cols]
//
// A cluster of two blocks makes 256 x 256 of the output, a block 128 x 256; the blocks share the
// tiles of W by multicast. One warp loads through the tensor memory accelerator into STAGES
// buffers; two warpgroups of 64 rows each multiply from there (wgmma) with the sums in registers.
// The rank comes last: without dropout as further depth, with dropout by mma.sync into fresh
// registers that are masked before they are added. Blocks stay for several tiles; a tile is stored
// while the next one multiplies. Options: DTYPE 1 or 2, BACKWARD, DROPOUT (rank at most 64) 1 = the mask
// is drawn while wgmma runs, 2 = it is read as bits, RANK_STEPS = the rank's last 1 to 4 steps of 16.
//
// SIDE 1 (backward): tiles rarely divide by the card, so the first `side.blocks` blocks make no tiles
// but gradients of the adapter, fed by the copy engine from memory that has time to spare.

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
