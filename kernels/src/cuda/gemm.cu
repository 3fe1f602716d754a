// Hopper: out = input · op(W) + bias + D(q · p), one rounding.
//
// forward  (BACKWARD 0): op(W) = Wᵀ, W [cols, depth];  p = Bᵀ from B [cols, rank]
// backward (BACKWARD 1): op(W) = W,  W [depth, cols];  p = A [rank, cols]
//
// A cluster of two blocks makes 256 x 256 of the output, a block 128 x 256; the blocks share the
// tiles of W by multicast. One warp loads through the tensor memory accelerator into STAGES
// buffers; two warpgroups of 64 rows each multiply from there (wgmma) with the sums in registers.
// Blocks stay for several tiles; a tile is stored while the next one multiplies.
//
// Without dropout the rank is further depth. With a mask that is read as bits (DROPOUT 2, backward) it comes first, and the
// sums are masked before the depth is added; with one that is drawn while wgmma runs (DROPOUT 1, forward), and in tiles that
// make q, it comes last, by mma.sync into fresh registers. Options: DTYPE 1 or 2, BACKWARD, DROPOUT (rank at most 64),
// RANK_STEPS = the rank's last 1 to 4 steps of 16.
//
// DOWN 1 (DROPOUT 0 or 2): q is not given, the first tiles of all rows make it from the input that they read anyway
// (down.cuh). DOWN 2 (forward, DROPOUT 0): the same of the input under `dropout`.
// TAIL: the tiles that are left after whole waves are made by several clusters each (tail.cuh).
// SIDE: gradients of the adapter are made beside (side.cuh).

// A place in the ring of stages.
struct Ring {
  int stage = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) gemm(
    const __grid_constant__ TensorMap input_map,   // [rows, depth], box 64 x 128
    const __grid_constant__ TensorMap weight_map,  // box 64 x 128, or 64 x 64 backward
    const __grid_constant__ TensorMap q_map,       // [rows, rank], box 64 x 128
    const __grid_constant__ TensorMap p_map,       // as weight_map
    const __grid_constant__ TensorMap out_map,     // [rows, cols], box 64 x 16
    const __grid_constant__ TensorMap down_map,    // DOWN: [rank, depth], box 64 x rank
    const __grid_constant__ TensorMap side0_map,   // z of the first side product, box 64 x 32
    const __grid_constant__ TensorMap side1_map,   // and of the second
    const T* __restrict__ bias,                    // [cols] or null
    int rows, int cols, int depth, int rank, int busy,  // clusters with tiles
    Dropout dropout,
    const u32* kept,  // DROPOUT 2: bits of [rows, cols]
    Flags flags, const __grid_constant__ Down down, const __grid_constant__ Side side, const __grid_constant__ Tail tail) {
  DYNAMIC_SHARED(shared);
  SHARED_BARRIERS(barriers, 2 * STAGES + 4);
  u32 stages = shared_address(shared), stores = stages + STAGES * STAGE_BYTES;
  u32 full = shared_address(barriers), empty = full + STAGES * 8, drained = empty + STAGES * 8, given = drained + 8, come = given + 8, summed = come + 8;

  u32 block = block_in_cluster();
  int cluster = blockIdx.x / CLUSTER;
  Walk walk = {(rows + CLUSTER * TILE_ROWS - 1) / (CLUSTER * TILE_ROWS), (cols + TILE_COLS - 1) / TILE_COLS, down.shares, down.at_once, down.stride};
  int tiles = cluster < busy ? walk.rows * walk.cols : 0;
  int depth_blocks = (depth + TILE_DEPTH - 1) / TILE_DEPTH, rank_blocks = (rank + TILE_DEPTH - 1) / TILE_DEPTH;
  // The last block of the rank is the remainder; those before it are further depth.
  int full_blocks = depth_blocks + rank_blocks - 1;
#if DOWN
  // Of tiles that make q: with a mask, pairs, of which a word has both; what is past the depth is zero.
  int making_blocks = DOWN == 2 ? (depth_blocks + 1) / 2 * 2 : depth_blocks;
#endif
#if TAIL
  int whole = tail.first, pieces = whole + (tiles - whole) * tail.split;
#else
  int whole = tiles, pieces = tiles;
#endif
  int warpgroup = threadIdx.x / 128;

  if (threadIdx.x == 32) prefetch_map(input_map), prefetch_map(weight_map), prefetch_map(DOWN ? down_map : q_map), prefetch_map(p_map);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 2 * CLUSTER);  // both math warpgroups of both blocks
    }
    barrier_init(drained, 8), barrier_init(given, 8);  // math warps
    barrier_init(come, 1), barrier_init(summed, 1);
  }
#if SIDE
  SHARED_BARRIERS(side_barriers, SIDE_WARPS * SIDE_STAGES + 1);
  if (threadIdx.x == 0) barrier_init(shared_address(side_barriers) + 8 * SIDE_WARPS * SIDE_STAGES, 1);
  if (threadIdx.x < SIDE_WARPS * SIDE_STAGES) barrier_init(shared_address(side_barriers) + 8 * threadIdx.x, 1);
#endif
  if (threadIdx.x < 32) fence_barriers();
  cluster_arrive_early(), cluster_wait();

  if (warpgroup == 0) {
    give_registers<LOADER_REGISTERS>();
    if (threadIdx.x == 0) {
      Ring ring;
      // Only q, or what makes it, comes from the kernel before this one: the base product need not await
      // it. No tile is stored before its rank has arrived, so the stores are behind this too.
      bool awaited = false;
      auto await_once = [&] {
        if (awaited) return;
        await_previous();
        start_next();
        awaited = true;
      };
#if DOWN
      u32 making_parity = 0;
      if (BACKWARD) await_once();  // the input may be what that kernel writes; forward, packing was between
#endif
      for (int index = cluster; index < pieces; index += busy) {
        Piece piece = piece_at(tail, index, depth_blocks);
        Tile tile = walk.at(piece.tile, block);
        int k = piece.from, steps = depth_blocks;
        bool making = DOWN && walk.makes(index);
#if DOWN
        Share share(down, making ? tile.col / TILE_COLS : 0, making_blocks);
        if (making) k = share.start, steps = making_blocks;
        bool has_room = false;  // for `down`, where the tile before was stored from
#endif
        int turns = piece.to < depth_blocks ? piece.to : steps + rank_blocks;
        for (int turn = piece.from; turn < turns; ++turn, ring.next()) {
          bool low = DROPOUT == 2 && !making ? turn == 0 : turn >= steps;
          u32 bar = full + 8 * ring.stage, dst = stages + ring.stage * STAGE_BYTES;
          u32 bytes = STAGE_BYTES;
          if (low) await_once();
#if DOWN
          bool owned = making && !low && share.owns(k);
          if (owned) bytes += DOWN_BYTES;
          if (low) {
            await_count(flags.ready(tile.row), READY);
            fence_copies();
          }
#endif
          const TensorMap& left = low ? q_map : input_map;
          const TensorMap& right = low ? p_map : weight_map;
          int at = (!low ? k : DROPOUT == 2 ? 0 : turn - steps) * TILE_DEPTH;
          barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
          barrier_expect(bar, bytes);
          load_box(dst, left, at, tile.row, bar);
          // Each block fetches half of the tile of W for both.
          dst += INPUT_BYTES + block * (WEIGHT_BYTES / CLUSTER);
#if BACKWARD
          load_box_for_cluster<CLUSTER>(dst, right, tile.col + block * 128, at, bar);
          load_box_for_cluster<CLUSTER>(dst + WEIGHT_COLS_BYTES, right, tile.col + block * 128 + 64, at, bar);
#else
          load_box_for_cluster<CLUSTER>(dst, right, at, tile.col + block * 128, bar);
#endif
#if DOWN
          if (owned) {
            await_once();
            if (!has_room) barrier_wait(drained, making_parity), making_parity ^= 1, has_room = true;
            load_box(stores + ring.stage * DOWN_BYTES, down_map, at, 0, bar);
          }
#endif
          if (!low && ++k == steps) k = 0;
        }
      }
    }
#if DOWN
    else if (threadIdx.x / 32 == 1) {
      u32 parity = 0, sums_parity = 0;
      for (int index = cluster; index < tiles && walk.makes(index); index += busy, parity ^= 1) {
        Tile tile = walk.at(index, block);
        barrier_wait(given, parity);
        // There is room for the sums: the tile before has been stored, and `down` been multiplied.
        add_shares(down, DOWN == 2 ? down.scale * dropout.scale : down.scale, flags, tile.col / TILE_COLS, tile.row, rows, shared + STAGES * STAGE_BYTES, come, sums_parity, threadIdx.x & 31);
        __syncwarp();
        if ((threadIdx.x & 31) == 0) barrier_arrive(summed);
      }
    }
#endif
#if SIDE && !DOWN
    // The other warps have the time.
    if (threadIdx.x >= 32) {
      await_previous();
#pragma unroll 1
      for (int i = 0; i < 2 && side.before[i].splits > 0; ++i)
        for (int unit = blockIdx.x * 3 + threadIdx.x / 32 - 1; unit < units_of<4>(side.before[i]); unit += gridDim.x * 3) add_up<4, 1>(side.before[i], unit, threadIdx.x & 31);
    }
#endif
  } else {
    take_registers<MATH_REGISTERS>();
    int math = warpgroup - 1, thread = threadIdx.x % 128, lane = thread & 31, warp = thread / 32;
    u32 buffers = stores + (math * 4 + warp) * 2 * STORE_BYTES;
    Ring ring;
    u32 out[TILE_COLS / 4];  // the tile before, rounded
    Tile last = {0, 0};
    bool waiting = false;
    // In boxes of 64 columns by the warp's 16 rows, swizzled: one is filled while the copy engine
    // reads the other, and no warp waits for another.
    auto store = [&](int box) {
      u32 to = buffers + box % 2 * STORE_BYTES;
      if (lane == 0) await_stores_left<1>();
      __syncwarp();
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) store_matrix(swizzled(to, lane & 15, pair * 2 + (lane >> 4)), &out[box * 16 + pair * 4]);  // 16 columns
      fence_shared();
      __syncwarp();
      if (lane == 0) {
        store_box(out_map, last.col + box * 64, last.row + math * 64 + warp * 16, to);
        commit_stores();
      }
    };
    auto store_half = [&](int half) { store(half * 2), store(half * 2 + 1); };
    auto stored = [&] {
      if (waiting) store_half(0), store_half(1);
      waiting = false;
      if (lane == 0) await_stores_left<0>();
    };
    float d[128];
    Tile tile;
    int row0, previous;  // of the warp; the stage before
#if DROPOUT == 1
    u64 first;  // word
    int rows8 = (cols + 127) / 128 * 32;
#endif
#if DROPOUT
    Keep keep;  // of the tile
#endif
    auto begin = [&](int index) {
      tile = walk.at(index, block);
      row0 = tile.row + math * 64 + warp * 16;
#if DROPOUT == 1
      first = first_word(row0 + (lane >> 2), tile.col, cols) + (lane & 3);
#endif
    };
    auto release = [&](int stage) {
      if (thread < CLUSTER) barrier_arrive_at(empty + 8 * stage, thread);
    };
    auto multiply = [&](u32 at, bool add) {
      u64 input = descriptor(at + math * (INPUT_BYTES / 2), 16);
      u64 weight = descriptor(at + INPUT_BYTES, BACKWARD ? WEIGHT_COLS_BYTES : 16);
#pragma unroll
      for (int step = 0; step < TILE_DEPTH / 16; ++step) wgmma<BACKWARD>(d, input + step * DEPTH_STEP, weight + step * WEIGHT_STEP, add || step > 0);
    };
    auto multiply_rank = [&](u32 at, bool add) {
      u64 input = descriptor(at + math * (INPUT_BYTES / 2), 16);
      u64 weight = descriptor(at + INPUT_BYTES, BACKWARD ? WEIGHT_COLS_BYTES : 16);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < RANK_STEPS; ++step) wgmma<BACKWARD>(d, input + step * DEPTH_STEP, weight + step * WEIGHT_STEP, add || step > 0);
      wgmma_commit();
    };
    // The rank as the last block, behind `turns` others of which the last may be in flight.
    auto add_rank = [&](int turns, auto is_flying) {
      constexpr bool FLYING = decltype(is_flying)::value;
      u32 at = stages + ring.stage * STAGE_BYTES;
#if DROPOUT
      if constexpr (FLYING) {
        wgmma_wait<0>();
        release(previous);
      }
#if DROPOUT == 1
      for (int i = max(turns - 2, 0); i < DRAWS; ++i) keep.draw(dropout, first, i, rows8);
#endif
      barrier_wait(full + 8 * ring.stage, ring.parity);
      add_masked_rank(d, at + (math * 64 + warp * 16) * 128, at + INPUT_BYTES, keep, DROPOUT == 1 ? dropout.scale : 1.f, lane);
      sync_some<128>(math + 1);
#else
      barrier_wait(full + 8 * ring.stage, ring.parity);
      multiply_rank(at, true);
      if constexpr (FLYING) {
        wgmma_wait<1>();
        release(previous);
      }
      wgmma_wait<0>();
#endif
      release(ring.stage);
      ring.next();
    };
    // Rounded at once, which frees the sums for the next tile; stored while that multiplies.
    auto round = [&] {
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
    };

    int index = cluster;
#if DOWN
    u32 summed_parity = 0;
    for (; index < tiles && walk.makes(index); index += busy, summed_parity ^= 1) {
      begin(index);
      Share share(down, tile.col / TILE_COLS, making_blocks);
      float low[2 * RANK_STEPS][4];  // of q
      int turn = 0;
      bool flying = false;
      auto release_previous = [&] {
        if (flying) release(previous);
        flying = true;
      };
      // `during` runs while the step is multiplied.
      auto other_step = [&](auto during) {
        int stage = ring.stage;
        barrier_wait(full + 8 * stage, ring.parity);
        ring.next();
        wgmma_fence();
        multiply(stages + stage * STAGE_BYTES, turn > 0);
        wgmma_commit();
        during();
        wgmma_wait<1>();
        release_previous();
        previous = stage;
        ++turn;
      };
      auto finish_steps = [&] {
        wgmma_wait<0>();
        if (flying) release(previous);
        flying = false;
      };
      while (turn < share.delay / 2)
        other_step([&] {
          if (!waiting) return;
          if (turn == 0) store_half(0);
          if (turn == 1) store_half(1), waiting = false;
        });
      stored();  // its buffers are for what makes q
      if (lane == 0) barrier_arrive(drained);
      if (DOWN == 2 || RANK_STEPS > 1) {
        // So that they have registers from here on only; not while products are under way, and not later.
        finish_steps();
#pragma unroll
        for (int n = 0; n < 2 * RANK_STEPS; ++n)
#pragma unroll
          for (int c = 0; c < 4; ++c) low[n][c] = zero_here();
      }
      // After every 16 of the depth of a step of its own.
      auto own_step = [&](int i, auto after) {
        int stage = ring.stage;
        u32 at = stages + stage * STAGE_BYTES;
        u64 input = descriptor(at + math * (INPUT_BYTES / 2), 16), factor = descriptor(stores + stage * DOWN_BYTES, 16);
        u64 weight = descriptor(at + INPUT_BYTES, BACKWARD ? WEIGHT_COLS_BYTES : 16);
        barrier_wait(full + 8 * stage, ring.parity);
        ring.next();
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < TILE_DEPTH / 16; ++step) {
          wgmma<BACKWARD>(d, input + step * DEPTH_STEP, weight + step * WEIGHT_STEP, turn > 0 || step > 0);
          after(step, input + step * DEPTH_STEP, factor + step * DEPTH_STEP, i > 0 || step > 0);
        }
        wgmma_commit();
        previous = stage;
        ++turn;
      };
#if DOWN == 2
      constexpr int STEPS = TILE_DEPTH / 16;
      // Words of rows g and g + 8 for 128 columns, two steps: of those at hand, and of the next.
      u32 words[2], drawn[2];
      // Word `i` of its own; the two of a pair of steps are drawn during the two steps before.
      auto draw = [&](int i) {
        drawn[0] = drawn[1];
        drawn[1] = kept_word(dropout, first_word(row0 + (lane >> 2) + i % 2 * 8, (share.own + i) * TILE_DEPTH, depth) + (lane & 3));
      };
      // The input of step `i` of its own, which is the next, as left operands.
      auto mask = [&](u32 (&x)[STEPS][4], int i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) words[h] = i % 2 == 0 ? drawn[h] : words[h] >> 8;
        if (i + 2 < share.steps) draw(i + 2);
        barrier_wait(full + 8 * ring.stage, ring.parity);
        u32 input = stages + ring.stage * STAGE_BYTES + (math * 64 + warp * 16) * 128;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
          ldmatrix(x[step], swizzled(input, lane & 15, 2 * step + (lane >> 4)));
#pragma unroll
          for (int r = 0; r < 4; ++r) x[step][r] = drop_halves(x[step][r], words[r % 2], 2 * step + r / 2);
        }
      };
      auto masked_step = [&](auto is_last, u32 (&x)[STEPS][4], u32 (&next)[STEPS][4], int i) {
        own_step(i, [&](int step, u64, u64 factor, bool add) {
          wgmma_narrow<false>(low, x[step], factor, add);
          if (step != STEPS - 2) return;
          // Most of this step is under way, and the one before, whose registers are the next one's, is done.
          int stage = previous;
          wgmma_wait<0>();
          if (flying) release(stage);
          flying = true;
          if (!decltype(is_last)::value) mask(next, i + 1);
        });
      };
      for (int i = 0; i < 2 - share.before + turn; ++i) draw(i);
      while (turn < share.before)
        other_step([&] {
          if (turn >= share.before - 2) draw(turn - share.before + 2);
        });
      u32 x[2][STEPS][4];
      mask(x[0], 0);
      int i = 0;
      for (; i < share.steps - 2; i += 2) masked_step(No{}, x[0], x[1], i), masked_step(No{}, x[1], x[0], i + 1);
      masked_step(No{}, x[0], x[1], i), masked_step(Yes{}, x[1], x[0], i + 1);
#else
      while (turn < share.before) other_step([] {});
      for (int i = 0; i < share.steps; ++i) {
        int before = previous;
        own_step(i, [&](int, u64 input, u64 factor, bool add) { wgmma_narrow(low, input, factor, add); });
        wgmma_wait<1>();
        if (flying) release(before);
        flying = true;
      }
#endif
      // The sums of q must be plain registers where the tile does not add to them.
      finish_steps();
      give_share(low, down, flags, share.index, row0, lane);
      if (lane == 0) barrier_arrive(given);
      while (turn < making_blocks) other_step([] {});
      finish_steps();
#if DROPOUT == 2
      keep.load(kept, row0, rows, tile.col, cols, lane);
#endif
      add_rank(making_blocks, No{});
      barrier_wait(summed, summed_parity);  // what was added up there has been read
      round();
    }
#endif
#if DROPOUT == 2
    bool loaded = false;  // during the tile before
#endif
    for (; index < whole; index += busy) {
      begin(index);
#if DROPOUT == 2
      barrier_wait(full + 8 * ring.stage, ring.parity);
      if (!loaded) keep.load(kept, row0, rows, tile.col, cols, lane);
      multiply_rank(stages + ring.stage * STAGE_BYTES, false);
      wgmma_wait<0>();
      release(ring.stage);
      ring.next();
      mask_rank(d, keep);
#endif
      for (int k = 0; k < full_blocks; ++k, ring.next()) {
        barrier_wait(full + 8 * ring.stage, ring.parity);
        wgmma_fence();
        multiply(stages + ring.stage * STAGE_BYTES, DROPOUT == 2 || k > 0);
        wgmma_commit();
        if (waiting) {
          if (k == 0) store_half(0);
          if (k == 1 || full_blocks == 1) store_half(1), waiting = false;
        }
#if DROPOUT == 1
        if (k >= 2 && k < DRAWS + 2) keep.draw(dropout, first, k - 2, rows8);
#elif DROPOUT == 2
        if (k == full_blocks / 2 && index + busy < tiles) {
          Tile next = walk.at(index + busy, block);
          keep.load(kept, next.row + math * 64 + warp * 16, rows, next.col, cols, lane);
          loaded = true;
        }
#endif
        wgmma_wait<1>();
        if (k > 0) release(previous);
        previous = ring.stage;
      }
#if DROPOUT == 2
      wgmma_wait<0>();
      release(previous);
#else
      add_rank(full_blocks, Yes{});
#endif
      round();
    }
    stored();
#if TAIL
    if (index < pieces) {
      Piece piece = piece_at(tail, index, depth_blocks);
      begin(piece.tile);
      for (int k = piece.from; k < piece.to; ++k, ring.next()) {
        barrier_wait(full + 8 * ring.stage, ring.parity);
        wgmma_fence();
        multiply(stages + ring.stage * STAGE_BYTES, k > piece.from);
        wgmma_commit();
        wgmma_wait<1>();
        if (k > piece.from) release(previous);
        previous = ring.stage;
      }
      if (piece.to == depth_blocks) {
        add_rank(piece.to, Yes{});
      } else {
        wgmma_wait<0>();
        release(previous);
      }
      exchange(d, tail, piece, flags, (block * 2 + math) * 4 + warp, lane);
      round();
#pragma unroll
      for (int box = 0; box < 4; ++box)
        if (owns_box(tail, piece, box)) store(box);
      waiting = false;
    }
#endif
#if SIDE
    __syncwarp();
    if (tiles == 0) await_previous();  // the loader of tiles has
    if (tiles == 0 || side.all) side_work(side0_map, side1_map, side, rows, kept, flags, shared, shared_address(side_barriers), threadIdx.x - 128, tiles == 0 ? cluster - busy : -1, block);
#endif
    if (lane == 0) await_stores();
  }
  // A block must not leave while its partner still signals it or loads for it.
  cluster_sync();
}
