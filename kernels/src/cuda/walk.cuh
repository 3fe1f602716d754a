// Hopper: in which order the clusters take their tiles. Options: DOWN.
struct Tile {
  int row, col;  // of this block's part
};

// Cluster c takes tiles c, c + busy, ... In groups of GROUP cluster rows, within a group down the rows, then on to the next
// columns. With DOWN the first `shares` columns come before, row by row: `at_once` tiles of every `stride`, until all are made.
struct Walk {
  int rows, cols;  // clusters of them
  int shares, at_once, stride;

  // How many tiles before `index` are of the first columns.
  __device__ __forceinline__ int making_before(int index) const {
    if (!DOWN) return 0;
    return min(index / stride * at_once + min(index % stride, at_once), shares * rows);
  }
  __device__ __forceinline__ bool makes(int index) const { return making_before(index + 1) > making_before(index); }
  __device__ __forceinline__ Tile at(int index, int block) const {
    int row, col, before = making_before(index);
    if (makes(index)) {
      row = before / shares;
      col = before % shares;
    } else {
      index -= before;
      int first_col = DOWN ? shares : 0, width = cols - first_col;
      int group = index / (GROUP * width), first = group * GROUP;
      int height = min(GROUP, rows - first), within = index - first * width;
      row = first + within % height;
      col = first_col + within / height;
    }
    return {(row * CLUSTER + block) * TILE_ROWS, col * TILE_COLS};
  }
};
