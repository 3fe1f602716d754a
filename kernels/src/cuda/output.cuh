// Hopper: a tile of the output, rounded and stored while the next one multiplies.
struct Output {
  const TensorMap& map;  // [rows, cols], box 64 x 16
  u32 buffers;           // of the warp, for two boxes
  int row, lane;         // of the warp within a tile
  u32 out[TILE_COLS / 4];
  Tile last = {0, 0};
  bool waiting = false;  // to be stored

  __device__ __forceinline__ Output(const TensorMap& map, u32 stores, const Math& math) : map(map), row(math.group * 64 + math.warp * 16), lane(math.lane) {
    buffers = stores + (math.group * 4 + math.warp) * 2 * STORE_BYTES;
  }
  // In boxes of 64 columns by the warp's 16 rows, swizzled: one is filled while the copy engine
  // reads the other, and no warp waits for another.
  __device__ __forceinline__ void store(int box) {
    u32 to = buffers + box % 2 * STORE_BYTES;
    if (lane == 0) await_stores_left<1>();
    __syncwarp();
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) store_matrix(swizzled(to, lane & 15, pair * 2 + (lane >> 4)), &out[box * 16 + pair * 4]);  // 16 columns
    fence_shared();
    __syncwarp();
    if (lane == 0) {
      store_box(map, last.col + box * 64, last.row + row, to);
      commit_stores();
    }
  }
  __device__ __forceinline__ void store_half(int half) { store(half * 2), store(half * 2 + 1); }
  // What is still to be stored, until it has left the buffers.
  __device__ __forceinline__ void finish() {
    if (waiting) store_half(0), store_half(1);
    waiting = false;
    if (lane == 0) await_stores_left<0>();
  }
  // Rounded at once, which frees the sums for the next tile.
  __device__ __forceinline__ void round(float (&d)[128], const Tile& tile, const T* bias, int cols) {
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
};
