//! Rows of the rank-sized product that the clusters without tiles make, as in spare.cuh.

use crate::hopper::{DEPTH, GROUP, STEP_MICROS, TILE};
use crate::low::Tiling;

/// Most ranks.
pub(crate) const MOST: usize = 64;
/// Rows of a unit.
pub(crate) const ROWS: usize = 64;

/// Elements of the input of which a block makes the product in a microsecond, drawing the mask, beside full tiles: 15,200
/// of 16 ranks, 13,000 of 32 and 10,300 of 64, measured on an H100.
fn elements_per_micro(ranks: usize) -> f64 {
    match ranks {
        ..=16 => 14_800.0,
        17..=32 => 12_500.0,
        _ => 9_800.0,
    }
}
/// Microseconds before it does.
const START_MICROS: f64 = 6.0;
/// The same of all blocks in a pass of their own: 27 to 29 µs for 8192x4096, measured there too.
const PASS_ELEMENTS_PER_MICRO: f64 = 1.2e6;

/// The first row that the spare blocks can make before a tile awaits it, of an input `[rows, depth]`: a
/// multiple of 128, or `rows` where they make none.
pub(crate) fn first_row((rows, depth): (usize, usize), ranks: usize, tiling: Tiling) -> usize {
    let unit_micros = (ROWS * depth) as f64 / elements_per_micro(ranks);
    let tile_micros = depth.div_ceil(DEPTH) as f64 * STEP_MICROS;
    // Tiles are taken in groups of rows; a group awaits the rank at the end of its first tiles. As in gemm.cu, few rows
    // are two groups.
    let height = if tiling.rows <= GROUP {
        GROUP / 2
    } else {
        GROUP
    };
    let late = (0..tiling.rows.div_ceil(height)).map(|group| {
        let wave = group * height * tiling.cols / tiling.busy;
        let units = (tile_micros * (wave + 1) as f64 - START_MICROS) / unit_micros;
        let made = (tiling.spare * ROWS) as f64 * units.floor().max(0.0);
        rows.min((group + 1) * height * TILE) as f64 - made
    });
    let first = late.fold(0.0, f64::max) as usize;
    first.next_multiple_of(128).min(rows)
}

/// Microseconds of a pass for the rows that the spare blocks make.
pub(crate) fn saves((rows, depth): (usize, usize), ranks: usize, tiling: Tiling) -> f64 {
    let rows = rows - first_row((rows, depth), ranks, tiling);
    rows as f64 * depth as f64 / PASS_ELEMENTS_PER_MICRO
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::Product;

    fn first(rows: usize, depth: usize, cols: usize, busy: usize, spare: usize) -> usize {
        let (rows_of_tiles, cols) = (rows.div_ceil(TILE), cols.div_ceil(TILE));
        let tiling = Tiling {
            product: Product::Forward,
            rows: rows_of_tiles,
            cols,
            busy,
            spare,
        };
        first_row((rows, depth), 16, tiling)
    }

    #[test]
    fn spare_blocks_make_what_they_have_time_for() {
        // Alone, they make none; for more columns, of which a tile takes as long, they have longer.
        assert_eq!(first(8192, 4096, 4096, 64, 0), 8192);
        assert_eq!(first(8192, 4096, 4096, 64, 4), 3840);
        assert_eq!(first(8192, 4096, 14336, 64, 4), 1536);
        // Many make all of it.
        assert_eq!(first(2048, 4096, 1024, 32, 68), 0);
        for rows in [1, 127, 128, 129, 300, 5000] {
            for spare in [0, 2, 4, 100] {
                let first = first(rows, 520, 512, 2, spare);
                assert!(first <= rows, "{first} of {rows} rows");
                let whole = first.is_multiple_of(128);
                assert!(first == rows || whole, "{first} of {rows} rows");
            }
        }
    }
}
