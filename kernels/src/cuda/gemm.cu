// Hopper: out = input · op(W) + bias + D(q · p), one rounding.
//
// forward  (BACKWARD 0): op(W) = Wᵀ, W [cols, depth];  p = Bᵀ from B [cols, rank]
// backward (BACKWARD 1): op(W) = W,  W [depth, cols];  p = A [rank, cols]
//
// A cluster of two blocks makes 256 x 256 of the output, a block 128 x 256; the blocks share the
// tiles of W by multicast. One warp loads through the tensor memory accelerator into STAGES
// buffers; two warpgroups of 64 rows each multiply from there (wgmma) with the sums in registers (math.cuh).
// Blocks stay for several tiles (walk.cuh); a tile is stored while the next one multiplies (output.cuh).
//
// Without dropout the rank is further depth. With a mask that is read as bits (DROPOUT 2, backward) it comes first, and the
// sums are masked before the depth is added; with one that is drawn while wgmma runs (DROPOUT 1, forward), and in tiles that
// make q, it comes last, by mma.sync into fresh registers. Options: DTYPE 1 or 2, BACKWARD, DROPOUT (rank at most 64),
// RANK_STEPS = the rank's last 1 to 4 steps of 16.
//
// DOWN 1 (DROPOUT 0 or 2): q is not given, the first tiles of all rows make it from the input that they read anyway
// (down.cuh, making.cuh). DOWN 2 (forward, DROPOUT 0): the same of the input under `dropout`.
// TAIL: the tiles that are left after whole waves are made by several clusters each (tail.cuh).
// SIDE: gradients of the adapter are made beside (side.cuh).

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
  SHARED_BARRIERS(barriers, 2 * STAGES + 3);
  u32 stages = shared_address(shared), stores = stages + STAGES * STAGE_BYTES;
  u32 full = shared_address(barriers), empty = full + STAGES * 8, drained = empty + STAGES * 8, given = drained + 8, come = given + 8;

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
    barrier_init(come, 1);
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
    Math math(stages, full, empty);
    Output output(out_map, stores, math);
    int lane = math.lane;
    Tile tile;
    int row0;  // of the warp
#if DROPOUT == 1
    u64 first;  // word
    int rows8 = (cols + 127) / 128 * 32;
#endif
#if DROPOUT
    Keep keep;  // of the tile
#endif
    auto begin = [&](int index) {
      tile = walk.at(index, block);
      row0 = tile.row + math.group * 64 + math.warp * 16;
#if DROPOUT == 1
      first = first_word(row0 + (lane >> 2), tile.col, cols) + (lane & 3);
#endif
    };
    // The rank as the last block, behind `turns` others of which the last may be in flight.
    auto add_rank = [&](int turns, auto is_flying) {
      constexpr bool FLYING = decltype(is_flying)::value;
#if DROPOUT
      if constexpr (FLYING) {
        wgmma_wait<0>();
        math.release(math.previous);
      }
#if DROPOUT == 1
      for (int i = max(turns - 2, 0); i < DRAWS; ++i) keep.draw(dropout, first, i, rows8);
#endif
      math.await();
      u32 at = math.at(math.ring.stage);
      add_masked_rank(math.d, at + (math.group * 64 + math.warp * 16) * 128, at + INPUT_BYTES, keep, DROPOUT == 1 ? dropout.scale : 1.f, lane);
      fence_loads();
      sync_some<128>(math.group + 1);
#else
      math.await();
      math.multiply_rank(math.ring.stage, true);
      if constexpr (FLYING) {
        wgmma_wait<1>();
        math.release(math.previous);
      }
      wgmma_wait<0>();
#endif
      math.release(math.ring.stage);
      math.ring.next();
    };
    auto round = [&] { output.round(math.d, tile, bias, cols); };

    int index = cluster;
#if DOWN
    for (; index < tiles && walk.makes(index); index += busy) {
      begin(index);
      Share share(down, tile.col / TILE_COLS, making_blocks);
      float low[2 * RANK_STEPS][4];  // of q
      Making making(math, share, stores, low);
      while (making.turn < share.delay / 2)
        making.other_step([&] {
          if (!output.waiting) return;
          if (making.turn == 0) output.store_half(0);
          if (making.turn == 1) output.store_half(1), output.waiting = false;
        });
      output.finish();  // its buffers are for what makes q
      if (lane == 0) barrier_arrive(drained);
      if (DOWN == 2 || RANK_STEPS > 1) making.clear();
#if DOWN == 2
      making.steps(dropout, row0, depth);
#else
      making.steps();
#endif
      give_share(low, down, flags, share.index, row0, lane);
      if (lane == 0) barrier_arrive(given);
      while (making.turn < making_blocks) making.other_step([] {});
      making.finish();
#if DROPOUT == 2
      keep.load(kept, row0, rows, tile.col, cols, lane);
#endif
      add_rank(making_blocks, No{});  // q has come: the sums in the output's buffers have been read
      round();
    }
#endif
#if DROPOUT == 2
    bool loaded = false;  // during the tile before
#endif
    for (; index < whole; index += busy) {
      begin(index);
#if DROPOUT == 2
      math.await();
      if (!loaded) keep.load(kept, row0, rows, tile.col, cols, lane);
      math.multiply_rank(math.ring.stage, false);
      wgmma_wait<0>();
      math.release(math.ring.stage);
      math.ring.next();
      mask_rank(math.d, keep);
#endif
      for (int k = 0; k < full_blocks; ++k, math.ring.next()) {
        math.await();
        wgmma_fence();
        math.multiply(math.ring.stage, DROPOUT == 2 || k > 0);
        wgmma_commit();
        if (output.waiting) {
          if (k == 0) output.store_half(0);
          if (k == 1 || full_blocks == 1) output.store_half(1), output.waiting = false;
        }
#if DROPOUT == 1
        if (k >= 2 && k < DRAWS + 2) keep.draw(dropout, first, k - 2, rows8);
#elif DROPOUT == 2
        if (k == full_blocks / 2 && index + busy < tiles) {
          Tile next = walk.at(index + busy, block);
          keep.load(kept, next.row + math.group * 64 + math.warp * 16, rows, next.col, cols, lane);
          loaded = true;
        }
#endif
        wgmma_wait<1>();
        if (k > 0) math.release(math.previous);
        math.previous = math.ring.stage;
      }
#if DROPOUT == 2
      wgmma_wait<0>();
      math.release(math.previous);
#else
      add_rank(full_blocks, Yes{});
#endif
      round();
    }
    output.finish();
#if TAIL
    if (index < pieces) {
      Piece piece = piece_at(tail, index, depth_blocks);
      begin(piece.tile);
      for (int k = piece.from; k < piece.to; ++k, math.ring.next()) {
        math.await();
        wgmma_fence();
        math.multiply(math.ring.stage, k > piece.from);
        wgmma_commit();
        wgmma_wait<1>();
        if (k > piece.from) math.release(math.previous);
        math.previous = math.ring.stage;
      }
      if (piece.to == depth_blocks) {
        add_rank(piece.to, Yes{});
      } else {
        wgmma_wait<0>();
        math.release(math.previous);
      }
      exchange(math.d, tail, piece, flags, (block * 2 + math.group) * 4 + math.warp, lane);
      round();
#pragma unroll
      for (int box = 0; box < 4; ++box)
        if (owns_box(tail, piece, box)) output.store(box);
      output.waiting = false;
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
