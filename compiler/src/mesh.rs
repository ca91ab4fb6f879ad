//! The mesh: the SMs of one GPU as `groups x members`, and how a matrix is split over it.
//!
//! Owns the arithmetic of shares, which the device library repeats (`device/prelude.cuh`, `share_of`), and nothing else.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// A contiguous share of a whole: `count` things from `begin`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// First thing.
    pub begin: usize,
    /// How many.
    pub count: usize,
}

impl Share {
    /// The things it holds.
    pub fn indices(&self) -> Range<usize> {
        self.begin..self.begin + self.count
    }

    /// What it has in common with another; empty where that is nothing.
    pub fn overlap(&self, other: &Share) -> Share {
        let (of, with) = (self.indices(), other.indices());
        let begin = of.start.max(with.start);
        Share {
            begin,
            count: of.end.min(with.end).saturating_sub(begin),
        }
    }
}

/// Share `index` of `total` things over `parts`: the first `total % parts` shares hold one more.
pub fn share(total: usize, parts: usize, index: usize) -> Share {
    Share {
        begin: index * (total / parts) + index.min(total % parts),
        count: total / parts + usize::from(index < total % parts),
    }
}

/// The CTAs of a launch, one to an SM. The first `groups * members` are the workers, which hold the layers; the rest only
/// help with the LM head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    /// First axis. Attention heads are split along it.
    pub groups: usize,
    /// Second axis.
    pub members: usize,
    /// All CTAs, workers or not.
    pub ctas: usize,
}

impl Mesh {
    /// CTAs that hold a part of the layers.
    pub fn workers(&self) -> usize {
        self.groups * self.members
    }

    /// Group and member of a worker.
    pub fn coordinates(&self, cta: usize) -> (usize, usize) {
        (cta / self.members, cta % self.members)
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} groups x {} members of {} CTAs",
            self.groups, self.members, self.ctas
        )
    }
}

/// What a mesh axis splits of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Split {
    /// The rows: the axis splits the output and every coordinate needs the same input.
    Rows,
    /// The columns: the axis splits the input and the products are partial sums.
    Columns,
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Split::Rows => "rows",
            Split::Columns => "columns",
        })
    }
}

/// How a linear's weight lies on the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// What the groups split.
    pub groups: Split,
    /// What the members of a group split.
    pub members: Split,
}

impl Placement {
    /// All four.
    pub const ALL: [Placement; 4] = [
        Placement {
            groups: Split::Rows,
            members: Split::Rows,
        },
        Placement {
            groups: Split::Columns,
            members: Split::Rows,
        },
        Placement {
            groups: Split::Rows,
            members: Split::Columns,
        },
        Placement {
            groups: Split::Columns,
            members: Split::Columns,
        },
    ];

    /// Into how many parts the rows are split.
    pub fn row_parts(&self, mesh: &Mesh) -> usize {
        self.parts(mesh, Split::Rows)
    }

    /// Into how many parts the columns are split.
    pub fn column_parts(&self, mesh: &Mesh) -> usize {
        self.parts(mesh, Split::Columns)
    }

    fn parts(&self, mesh: &Mesh, of: Split) -> usize {
        let along = |split: Split, size: usize| if split == of { size } else { 1 };
        along(self.groups, mesh.groups) * along(self.members, mesh.members)
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "groups split {}, members split {}",
            self.groups, self.members
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_are_what_both_hold() {
        let share = |begin, count| Share { begin, count };
        let check = |a: Share, b: Share, expect: &[usize]| {
            assert_eq!(a.overlap(&b).indices().collect::<Vec<_>>(), expect);
            assert_eq!(b.overlap(&a).indices().collect::<Vec<_>>(), expect);
        };
        check(share(2, 4), share(4, 9), &[4, 5]);
        check(share(2, 4), share(3, 1), &[3]);
        check(share(2, 4), share(6, 3), &[]);
        check(share(2, 4), share(9, 3), &[]);
    }

    #[test]
    fn shares_tile_the_whole() {
        for total in 0..40 {
            for parts in 1..12 {
                let mut next = 0;
                for index in 0..parts {
                    let share = share(total, parts, index);
                    assert_eq!(share.begin, next, "{total} over {parts}");
                    assert!(share.count.abs_diff(total / parts) <= 1);
                    next += share.count;
                }
                assert_eq!(next, total);
            }
        }
    }
}
