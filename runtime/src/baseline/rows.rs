//! Which rows go through the model together: a prefill's chunks, and what every row is.
//!
//! Owns the arithmetic of chunks, tiles and splits. It must not touch a GPU.
//!
//! A row is one token of one sequence. A prefill lines up the tokens of all prompts, one prompt after the other, and
//! cuts the line into chunks of [`CHUNK`] rows; attention takes tiles of neighbouring rows of one prompt.

use std::ops::Range;

use super::kernels::MAX_SPLITS;

/// Rows of a pass at most. Larger passes make better use of the matrices, which are read once in each.
pub(super) const CHUNK: usize = 512;

/// Positions that a block of attention should have at least before a range is split further.
const MIN_RANGE: usize = 64;

/// The rows of a prefill, in the order of the line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Prefill {
    /// Token of each row.
    pub(super) tokens: Vec<u32>,
    /// Sequence of each row.
    pub(super) slots: Vec<u32>,
    /// Position of each row in its sequence.
    pub(super) positions: Vec<u32>,
    /// First row, counted from the chunk's first, and number of rows of each tile.
    pub(super) tiles: Vec<[u32; 2]>,
    /// Last row of each prompt, counted from the first row of its chunk.
    pub(super) ends: Vec<u32>,
    /// What goes through the model at once.
    pub(super) chunks: Vec<Chunk>,
}

/// One pass of a prefill: ranges of the lists of [`Prefill`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) rows: Range<usize>,
    pub(super) tiles: Range<usize>,
    pub(super) ends: Range<usize>,
    /// Positions that the row with the longest past attends to.
    pub(super) longest: usize,
}

impl Prefill {
    /// Lines up `prompts`, each the sequence of its index, for tiles of up to `tile` rows. No prompt may be empty.
    pub(super) fn new(prompts: &[&[u32]], tile: usize) -> Self {
        let mut plan = Self::default();
        let mut last_rows = Vec::new();
        for (slot, prompt) in (0u32..).zip(prompts) {
            plan.tokens.extend_from_slice(prompt);
            plan.slots.extend(prompt.iter().map(|_| slot));
            plan.positions.extend((0u32..).take(prompt.len()));
            last_rows.push(plan.tokens.len() - 1);
        }
        for start in (0..plan.tokens.len()).step_by(CHUNK) {
            let rows = start..(start + CHUNK).min(plan.tokens.len());
            let first_tile = plan.tiles.len();
            for row in rows.clone() {
                let fits = plan.tiles[first_tile..]
                    .last()
                    .is_some_and(|[first, count]| {
                        *count < tile as u32
                            && plan.slots[start + *first as usize] == plan.slots[row]
                    });
                match plan.tiles.last_mut() {
                    Some([_, count]) if fits => *count += 1,
                    _ => plan.tiles.push([(row - start) as u32, 1]),
                }
            }
            let first_end = plan.ends.len();
            plan.ends.extend(
                last_rows
                    .iter()
                    .filter(|row| rows.contains(row))
                    .map(|row| (row - start) as u32),
            );
            let longest = plan.positions[rows.clone()]
                .iter()
                .max()
                .map_or(0, |position| *position as usize + 1);
            plan.chunks.push(Chunk {
                rows,
                tiles: first_tile..plan.tiles.len(),
                ends: first_end..plan.ends.len(),
                longest,
            });
        }
        plan
    }
}

/// Rows that a matrix product is made for: as they are up to 16, else the next power of two, so that a prefill of any
/// length needs few shapes. The rows in excess are multiplied and ignored.
pub(super) fn matmul_rows(rows: usize) -> usize {
    if rows <= 16 {
        rows
    } else {
        rows.next_power_of_two()
    }
}

/// Ranges of positions that attention over `longest` positions is split into, where `blocks` blocks (tiles times KV
/// heads) would run without: so many that two blocks for each multiprocessor are at work, but none too short.
pub(super) fn splits(blocks: usize, longest: usize, multiprocessors: usize) -> usize {
    let wanted = (2 * multiprocessors).div_ceil(blocks.max(1));
    wanted.min(longest.div_ceil(MIN_RANGE)).clamp(1, MAX_SPLITS)
}

/// Blocks of attention that can be split at most, with their splits: the room that parts need.
pub(super) fn most_parts(multiprocessors: usize) -> usize {
    // Split at all only where there are fewer blocks than 2 * multiprocessors, and then into at most one more each.
    4 * multiprocessors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_lined_up_and_tiled_within_each() {
        let plan = Prefill::new(&[&[10, 11, 12], &[20, 21]], 2);
        assert_eq!(plan.tokens, [10, 11, 12, 20, 21]);
        assert_eq!(plan.slots, [0, 0, 0, 1, 1]);
        assert_eq!(plan.positions, [0, 1, 2, 0, 1]);
        assert_eq!(plan.tiles, [[0, 2], [2, 1], [3, 2]]);
        assert_eq!(plan.ends, [2, 4]);
        assert_eq!(
            plan.chunks,
            [Chunk {
                rows: 0..5,
                tiles: 0..3,
                ends: 0..2,
                longest: 3
            }]
        );
    }

    #[test]
    fn long_prompts_go_through_in_chunks() {
        let (first, second) = (vec![1; CHUNK + 3], vec![2; 4]);
        let plan = Prefill::new(&[&first, &second], 4);
        let rows: Vec<_> = plan.chunks.iter().map(|chunk| chunk.rows.clone()).collect();
        assert_eq!(rows, [0..CHUNK, CHUNK..CHUNK + 7]);
        assert_eq!(plan.chunks[0].ends, 0..0);
        // Rows of a chunk count from its start.
        assert_eq!(plan.ends, [2, 6]);
        assert_eq!(plan.tiles[plan.chunks[1].tiles.clone()], [[0, 3], [3, 4]]);
        assert_eq!(
            (plan.chunks[0].longest, plan.chunks[1].longest),
            (CHUNK, CHUNK + 3)
        );
    }

    #[test]
    fn every_row_is_in_one_tile() {
        let prompt: Vec<u32> = (0..1500).collect();
        let plan = Prefill::new(&[&prompt[..7], &prompt, &prompt[..1]], 8);
        for chunk in &plan.chunks {
            let covered: u32 = plan.tiles[chunk.tiles.clone()]
                .iter()
                .map(|[_, count]| count)
                .sum();
            assert_eq!(covered as usize, chunk.rows.len());
        }
    }

    #[test]
    fn attention_is_split_to_fill_the_gpu_and_no_further() {
        let check = |blocks, longest, expect| assert_eq!(splits(blocks, longest, 132), expect);
        check(8, 64, 1);
        check(8, 65, 2);
        check(8, 4000, 32);
        check(128, 4000, 3);
        check(264, 4000, 1);
        check(8, 1, 1);
        for blocks in 1..600 {
            let splits = splits(blocks, 1 << 20, 132);
            assert!(
                splits == 1 || blocks * splits <= most_parts(132),
                "{blocks}"
            );
        }
    }

    #[test]
    fn prefills_share_matrix_shapes() {
        let rows: Vec<_> = [1, 3, 16, 17, 33, 512].map(matmul_rows).into();
        assert_eq!(rows, [1, 3, 16, 32, 64, 512]);
    }
}
