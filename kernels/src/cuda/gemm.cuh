// Hopper: the tile of the product, its copies within a cluster and its step on the tensor cores.
// Options: DTYPE 1 or 2, BACKWARD, DOWN, RANK_STEPS.
constexpr int TILE_ROWS = 128, TILE_COLS = 256, TILE_DEPTH = 64;
constexpr int STAGES = 4;
constexpr int CLUSTER = 2;
constexpr int GROUP = 8;  // cluster rows that are walked together, so that W is reused in L2
constexpr int INPUT_BYTES = TILE_ROWS * TILE_DEPTH * 2, WEIGHT_BYTES = TILE_COLS * TILE_DEPTH * 2;
constexpr int STAGE_BYTES = INPUT_BYTES + WEIGHT_BYTES;
constexpr int STORE_BYTES = 16 * 64 * 2;  // a store box: 16 rows of 128 bytes
constexpr int THREADS = 384, SHARED_BYTES = STAGES * STAGE_BYTES + 8 * 2 * STORE_BYTES;  // as in hopper.rs
constexpr int LOADER_REGISTERS = 40, MATH_REGISTERS = 232;

constexpr u32 WEIGHT_COLS_BYTES = TILE_DEPTH * 128;             // to the next 64 columns of a tile of W, backward
constexpr u32 WEIGHT_STEP = BACKWARD ? 2048 >> 4 : DEPTH_STEP;  // 16 rows, or 32 bytes of a row
