// Hopper: gradients of the adapter, made by blocks that make no tiles.
// Options: SIDE 1 = there are some; DROPOUT 2 = the second z is masked; RANK_STEPS.

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
