// Hopper: one pass over z [rows, cols] for the products with rank-sized matrices that need all of it, and on through columns
// of another matrix for a product with what that made.
//
//           part[block][j, c] = sum over the rows m of a block of q[m, j] * D(z)[m, c]
// DOWN 1    s[m, j] = scale_j * sum over columns c of D(z)[m, c] * p[j, c] as well
// NEXT > 0  and then next.part[block][j, c] = sum of s[m, j] * D(next.z)[m, c], columns from next.first_col on
//
// A group of blocks, a cluster with DOWN, takes `block_rows` rows, a multiple of 64, and splits their columns. One warp of
// a block loads tiles of 64 x 64 into rings. Two warpgroups take every other tile of a row of them and multiply from there
// (wgmma): zᵀ q, whose sums stay in registers for all rows, and z pᵀ, whose sums the blocks of a group send each other
// after every 64 rows. A block adds up its share of those while it multiplies the next, always in the same order.
//
// Options: DTYPE 1 or 2, RT ranks (16, 32 or 64), PAIRS of tiles in a row of a block (for the registers of their sums
// see `most_pairs` in sweep.rs), DROPOUT 0, 1 = z is masked by counter, 2 = by bits (DOWN 0). BITS 1 = draw those of
// another matrix on the way, since the arithmetic units have time while memory has none. NEXT (with DOWN) = pairs of tiles
// in a row of the other matrix, which is masked with BITS.

// Tiles have the rows of a strip (cluster_sum.cuh), and 64 columns.
constexpr int LOAD_ROWS = 16;  // that are loaded at once
constexpr int TILE_BYTES = STRIP * 128;
constexpr int SERVICE = BITS && RT == 16 ? 2 : 1;  // warpgroups that load and draw
constexpr int DRAWERS = BITS ? SERVICE * 4 - 1 : 0;  // warps
constexpr int THREADS = (SERVICE + 2) * 128;
constexpr int SERVICE_REGISTERS = BITS ? 88 : 40, MATH_REGISTERS = !BITS ? 232 : SERVICE == 2 ? 168 : 208;
constexpr int Q_STAGES = RT == 64 ? 2 : 4, Q_BYTES = STRIP * RT * 2;
constexpr int P_BYTES = DOWN ? RT * 128 : 0;  // for one tile
constexpr int MASK_BYTES = DROPOUT == 2 || NEXT && BITS ? 2 * BITS_BYTES : 0;
constexpr int ROOM = 226 << 10;  // as in sweep.rs
constexpr int STAGES = (ROOM - Q_STAGES * Q_BYTES - 2 * PAIRS * P_BYTES - MEETS * MEET_BYTES - SUMS_BYTES) / (2 * (TILE_BYTES + MASK_BYTES));
static_assert(STAGES >= 2, "a tile is to be on its way while another is read");
constexpr int SIDE_BY_SIDE = STAGES < 4 ? 2 : STAGES < 8 ? 4 : 8;  // tiles that are loaded together, no more than half a ring
// The next of a row must not wait for the last that is multiplied.
constexpr bool row_fits(int pairs) { return (pairs < SIDE_BY_SIDE ? pairs - SIDE_BY_SIDE / 2 : SIDE_BY_SIDE / 2) < STAGES; }
static_assert(row_fits(PAIRS) && row_fits(NEXT), "a ring that small");

// A mask as bits: read by DROPOUT 2, written by BITS.
struct Bits {
  u32* keep;
  int rows, cols;
  Dropout dropout;
};

// The other matrix.
struct Next {
  float* part;  // [blocks, RT, cols]
  int cols, first_col;
};

constexpr u32 Q_STEP = 16 * RT * 2 >> 4, ROWS_STEP = 16 * 128 >> 4;

extern "C" __global__ void __launch_bounds__(THREADS, 1) sweep(
    const __grid_constant__ TensorMap z_map,  // [rows, cols], box 64 x 16
    const __grid_constant__ TensorMap p_map,  // [RT, cols or padded cols], box 64 x RT
    const __grid_constant__ TensorMap q_map,  // [rows, RT], box RT x 64
    T* __restrict__ s,                        // [rows, lds]
    float* __restrict__ part,                 // [blocks, RT, cols]
    int rows, int cols, int lds, int block_rows, int group, const __grid_constant__ Scales scales, Dropout dropout, const __grid_constant__ Bits bits,
    const __grid_constant__ TensorMap next_map,  // the other matrix, as z_map
    const __grid_constant__ TensorMap s_map,     // as q_map
    const __grid_constant__ Next next) {
  DYNAMIC_SHARED(shared);
  SHARED_BARRIERS(barriers, 4 * STAGES + 2 * Q_STAGES + 2 * MEETS + 1);
  u32 rings = shared_address(shared), q_ring = rings + 2 * STAGES * TILE_BYTES, p_tiles = q_ring + Q_STAGES * Q_BYTES;
  u32 meet = p_tiles + 2 * PAIRS * P_BYTES, own_sums = meet + MEETS * MEET_BYTES, masks = own_sums + SUMS_BYTES;
  u32 full = shared_address(barriers), empty = full + 2 * STAGES * 8, q_full = empty + 2 * STAGES * 8, q_empty = q_full + Q_STAGES * 8;
  u32 met = q_empty + Q_STAGES * 8, taken = met + MEETS * 8, made = taken + MEETS * 8;

  int rank = blockIdx.x % group, block = blockIdx.x / group, warpgroup = threadIdx.x / 128;
  int row0 = block * block_rows, strips = (min(block_rows, rows - row0) + STRIP - 1) / STRIP;
  int col0 = rank * 2 * PAIRS * 64, next_col0 = next.first_col + rank * 2 * NEXT * 64;
  ClusterSum cluster_sum(shared + (meet - rings), shared + (own_sums - rings), met, taken, group, rank, strips);

  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * STAGES; ++i) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 1);
    for (int i = 0; i < Q_STAGES; ++i) barrier_init(q_full + 8 * i, 1), barrier_init(q_empty + 8 * i, 2);
    if (DOWN) cluster_sum.init_barriers();
    if (NEXT) barrier_init(made, group * (8 + DRAWERS));
    fence_barriers();
  }
  __syncthreads();
  if (DOWN) cluster_arrive_early();  // the blocks of a group may send once all have
  // Of a warp that has written its part of s or of the bits, which all blocks of the group are going to load.
  auto tell_made = [&] {
    fence_copies();
    __syncwarp();
    if (threadIdx.x % 32 < group) barrier_arrive_cluster(made, threadIdx.x % 32);
  };

  if (warpgroup < SERVICE) {
    give_registers<SERVICE_REGISTERS>();
    if (DOWN) cluster_wait();
    if (threadIdx.x == 0) {
      await_previous();
      start_next();
      int stage = 0, q_stage = 0;
      u32 parity = 0, q_parity = 0;
      auto load_q = [&](const TensorMap& map, int row) {
        barrier_wait(q_empty + 8 * q_stage, q_parity ^ 1);
        barrier_expect(q_full + 8 * q_stage, Q_BYTES);
        load_box(q_ring + q_stage * Q_BYTES, map, 0, row, q_full + 8 * q_stage);
        if (++q_stage == Q_STAGES) q_stage = 0, q_parity ^= 1;
      };
      auto place = [&](int i) { return i % 2 * STAGES + (stage + i / 2) % STAGES; };
      auto masked_rows = [&](int row) { return rows - row > 32 ? 2 : 1; };  // 32 each
      auto load_mask = [&](int at, int row, int col, int cols) {
        for (int half = 0; half < masked_rows(row); ++half) load_box_bits(masks + at * MASK_BYTES + half * BITS_BYTES, bits.keep, row + half * 32, col, cols, full + 8 * at);
      };
      // The tiles of a strip, and those of p beside the first; the mask may come later.
      auto load_tiles = [&](auto is_next, const TensorMap& map, int row, int col0, int cols, bool with_p, bool with_mask) {
        constexpr bool OTHER = decltype(is_next)::value, MASKED = OTHER ? BITS : DROPOUT == 2;
        constexpr int TILES = 2 * (OTHER ? NEXT : PAIRS);
        // Boxes side by side are loaded a few rows at a time: the memory likes neighbours together.
        for (int first = 0; first < TILES; first += SIDE_BY_SIDE) {
          int count = min(SIDE_BY_SIDE, TILES - first);
          for (int i = 0; i < count; ++i) {
            int at = place(i);
            barrier_wait(empty + 8 * at, parity ^ (stage + i / 2 < STAGES));
            barrier_expect(full + 8 * at, TILE_BYTES + (MASKED ? masked_rows(row) * BITS_BYTES : 0) + (with_p ? P_BYTES : 0));
          }
          for (int from = 0; from < STRIP; from += LOAD_ROWS)
            for (int i = 0; i < count; ++i) {
              u32 to = rings + place(i) * TILE_BYTES + from * 128, bar = full + 8 * place(i);
              if (OTHER) load_box_once(to, map, col0 + (first + i) * 64, row + from, bar);
              else load_box(to, map, col0 + (first + i) * 64, row + from, bar);  // the product is to find z in the cache
            }
          for (int i = 0; i < count; ++i) {
            if (with_p) load_box(p_tiles + (first + i) * P_BYTES, p_map, col0 + (first + i) * 64, 0, full + 8 * place(i));
            if (MASKED && with_mask) load_mask(place(i), row, col0 + (first + i) * 64, cols);
          }
          if ((stage += count / 2) >= STAGES) stage -= STAGES, parity ^= 1;
        }
      };
      for (int strip = 0; strip < strips; ++strip) {
        int row = row0 + strip * STRIP;
        load_q(q_map, row);
        load_tiles(No{}, z_map, row, col0, cols, DOWN && strip == 0, true);
      }
#if NEXT
      // As many tiles as there is room for come while the group finishes s, and the bits.
      int early = min(strips, STAGES / NEXT), start = stage;
      for (int strip = 0; strip < early; ++strip) load_tiles(Yes{}, next_map, row0 + strip * STRIP, next_col0, next.cols, false, false);
      barrier_wait_cluster(made, 0), fence_copies();
      for (int strip = 0; strip < strips; ++strip) {
        int row = row0 + strip * STRIP;
        load_q(s_map, row);
        if (strip >= early) load_tiles(Yes{}, next_map, row, next_col0, next.cols, false, true);
        for (int i = 0; BITS && strip < early && i < 2 * NEXT; ++i) load_mask(i % 2 * STAGES + (start + strip * NEXT + i / 2) % STAGES, row, next_col0 + i * 64, next.cols);
      }
#endif
    }
#if BITS
    if (threadIdx.x >= 32) {
      await_previous();
      // With the other matrix, those of the rows that this group needs.
      int from = NEXT ? row0 : 0, to = NEXT ? min(row0 + block_rows, bits.rows) : bits.rows, blocks = NEXT ? group : gridDim.x;
      int lane = threadIdx.x & 31, drawer = (NEXT ? rank : blockIdx.x) * DRAWERS + threadIdx.x / 32 - 1;
      int groups = (bits.cols + 127) / 128, end = (to + 31) / 32 * groups;
      for (int unit = from / 32 * groups + drawer; unit < end; unit += blocks * DRAWERS) store_bits(bits.dropout, bits.keep, unit, bits.rows, bits.cols, lane);
      if (NEXT) tell_made();
    }
#endif
    return;
  }

  take_registers<MATH_REGISTERS>();
  int math = warpgroup - SERVICE, thread = threadIdx.x % 128, lane = thread & 31, warp = thread / 32, g = lane >> 2, t = lane & 3;
  auto warpgroup_sync = [&] { sync_some<128>(math + 1); };
#if DOWN
  int both = math * 128 + thread;
  for (int i = 0; i < MEETS; ++i) cluster_sum.expect(i, both);
  auto add_up = [&](int strip) {
    cluster_sum.add_up(strip, both, [&](int row, int pair, float2 sum) {
      float scale = scales.of[pair / 8];
      if (DROPOUT) scale *= dropout.scale;
      row += row0 + strip * STRIP;
      if (row < rows) *reinterpret_cast<u32*>(s + (i64)row * lds + 2 * pair) = pack_halves(scale * sum.x, scale * sum.y);
    });
  };
  cluster_wait();
#endif
  int stage = 0, q_stage = 0, previous = 0;
  u32 parity = 0, q_parity = 0;
  auto release = [&](int stage) {
    if (thread == 0) barrier_arrive(empty + 8 * (math * STAGES + stage));
  };
  auto multiply_rows = [&](auto is_next, float* part, int col0, int cols) {
    constexpr bool OTHER = decltype(is_next)::value, MAKES = DOWN && !OTHER;
    constexpr int TILES = OTHER ? NEXT : PAIRS, MASK = OTHER ? 2 * BITS : DROPOUT;
    float acc[TILES][RT / 8][4] = {};
    float down[RT / 8][4];
    for (int strip = 0; strip < strips; ++strip) {
      barrier_wait(q_full + 8 * q_stage, q_parity);
      u64 q = narrow_descriptor<RT>(q_ring + q_stage * Q_BYTES);
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        int at = math * STAGES + stage;
        u32 box = rings + at * TILE_BYTES;
        barrier_wait(full + 8 * at, parity);
        if constexpr (MASK == 1) {
          // A thread takes 8 columns of four rows; eight threads have the same rows and, to draw, two words each.
          int first = col0 + (2 * i + math) * 64, chunk = thread % 8, from = lane & 24;
          u32 drawn[2];
#pragma unroll
          for (int k = 0; k < 2; ++k) drawn[k] = kept_word(dropout, first_word(row0 + strip * STRIP + (2 * k + chunk / 4) * 16 + thread / 8, first, cols) + chunk % 4);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            int row = k * 16 + thread / 8, col = first + chunk * 8;
            Vec v = load_vector(swizzled(box, row, chunk));
            drop(Kept::of(col, [&](int t) { return __shfl_sync(0xffffffffu, drawn[k / 2], from + k % 2 * 4 + t); }), v);
            store_vector(swizzled(box, row, chunk), v);
          }
          fence_shared();
          warpgroup_sync();
        }
        if constexpr (MASK == 2) {
          // By bits: a warp takes its 16 columns to registers, from where they are multiplied.
          u32 z[STRIP / 16][4];
#pragma unroll
          for (int k = 0; k < STRIP / 16; ++k) {
            ldmatrix_transposed(z[k], swizzled(box, k * 16 + (lane & 15), 2 * warp + (lane >> 4)));
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              u32 kept = load_pair(masks + at * MASK_BYTES, k * 16 + half * 8, col0 + (2 * i + math) * 64, lane) >> 2 * warp;
              z[k][half] = drop_halves(z[k][half], kept, 0), z[k][half + 2] = drop_halves(z[k][half + 2], kept, 1);
            }
          }
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < STRIP / 16; ++k) wgmma_narrow<true>(acc[i], {z[k][0], z[k][2], z[k][1], z[k][3]}, q + k * Q_STEP, 1);
          wgmma_commit();
          wgmma_wait<0>();
          warpgroup_sync();
          release(stage);
          if (++stage == STAGES) stage = 0, parity ^= 1;
          continue;
        }
        u64 z = descriptor(box, 16);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < STRIP / 16; ++k) wgmma_narrow<true>(acc[i], z + k * ROWS_STEP, q + k * Q_STEP, 1);
        if constexpr (MAKES) {
          u64 p = descriptor(p_tiles + (2 * i + math) * P_BYTES, 16);
#pragma unroll
          for (int k = 0; k < 4; ++k) wgmma_narrow<false>(down, z + k * DEPTH_STEP, p + k * DEPTH_STEP, i > 0 || k > 0);
        }
        wgmma_commit();
        if (i > 0) {
          wgmma_wait<1>();
          release(previous);
        }
        previous = stage;
        if (++stage == STAGES) stage = 0, parity ^= 1;
#if DOWN
        // Where the next sums have to wait for it, so early that they need not.
        if (MAKES && i == (AT_ONCE ? TILES - 1 : TILES / 2) && strip > 0) add_up(strip - 1);
#endif
      }
      if constexpr (MASK != 2) {
        wgmma_wait<0>();
        release(previous);
      }
      if (thread == 0) barrier_arrive(q_empty + 8 * q_stage);
      if (++q_stage == Q_STAGES) q_stage = 0, q_parity ^= 1;
#if DOWN
      if (MAKES) cluster_sum.give(down, strip, both);
#endif
    }
#if DOWN
    if (MAKES) {
      add_up(strips - 1);
      if (NEXT) tell_made();
      else if (!AT_ONCE) cluster_arrive();
    }
#endif
    float scale = MASK == 0 ? 1.f : MASK == 1 ? dropout.scale : bits.dropout.scale;
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int n = 0; n < RT / 8; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          int col = col0 + (2 * i + math) * 64 + warp * 16 + (c >> 1) * 8 + g, j = n * 8 + 2 * t + (c & 1);
          if (col < cols) part[((i64)block * RT + j) * cols + col] = scale * acc[i][n][c];
        }
  };
  multiply_rows(No{}, part, col0, cols);
#if NEXT
  multiply_rows(Yes{}, next.part, next_col0, next.cols);
#elif DOWN
  if (!AT_ONCE) cluster_wait();  // a block must not leave before its sums have
#endif
}
