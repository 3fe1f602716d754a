// Hopper: what blocks of one launch tell each other through memory that was zero before it.

constexpr int CLUSTER_WARPS = CLUSTER * TILE_ROWS / 16;

// As in hopper.rs.
struct Flags {
  u32* words;
  int cluster_rows;
  // Next unit of side work.
  __device__ __forceinline__ u32* unit() const { return words; }
  // Shares of q that are there, for every 128 rows.
  __device__ __forceinline__ u32* shares(int row) const { return words + 1 + row / 128; }
  // Sixteens of rows of q that are there, for every 128 rows.
  __device__ __forceinline__ u32* ready(int row) const { return words + 1 + cluster_rows * 2 + row / 128; }
  // Parts of the sums of a tile that are there, for every warp of a cluster.
  __device__ __forceinline__ u32* given(int tile, int warp) const { return words + 1 + cluster_rows * 4 + tile * CLUSTER_WARPS + warp; }
};
constexpr int READY = 8;  // sixteens
