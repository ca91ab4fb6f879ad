//! What decides who goes next: a seed, an order of CTAs and a manner of delivery. Everything follows from the seed.

use std::fmt;

use mirage_compiler::mesh::Mesh;

/// Numbers of a seed (SplitMix64).
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number below `end`, which is at least 1.
    pub(super) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// True once in so many times.
    pub(super) fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// Which of the CTAs that can go on does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Any.
    Uniform,
    /// One goes only when no other can.
    OneBehind,
    /// One goes whenever it can.
    OneAhead,
    /// One group as far as it comes, then the next.
    GroupsApart,
    /// The one that has come to be able to last.
    NewestFirst,
    /// The first of a list that is reversed at random moments.
    Reversal,
}

/// When writes reach memory; which of them come first is random.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Almost at once.
    Prompt,
    /// At any time.
    Random,
    /// When nobody can go on without.
    Late,
}

/// An interleaving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Decides all that is random.
    pub seed: u64,
    /// Who goes on.
    pub order: Order,
    /// When writes arrive.
    pub delivery: Delivery,
}

impl Schedule {
    /// The interleaving of a seed; eighteen seeds one after the other have every order with every delivery.
    pub fn of(seed: u64) -> Schedule {
        let orders = [
            Order::Uniform,
            Order::OneBehind,
            Order::OneAhead,
            Order::GroupsApart,
            Order::NewestFirst,
            Order::Reversal,
        ];
        let deliveries = [Delivery::Prompt, Delivery::Random, Delivery::Late];
        Schedule {
            seed,
            order: orders[(seed % 6) as usize],
            delivery: deliveries[(seed / 6 % 3) as usize],
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let order = match self.order {
            Order::Uniform => "any CTA next",
            Order::OneBehind => "one CTA far behind",
            Order::OneAhead => "one CTA far ahead",
            Order::GroupsApart => "groups apart",
            Order::NewestFirst => "newest first",
            Order::Reversal => "reversed at random",
        };
        let delivery = match self.delivery {
            Delivery::Prompt => "prompt writes",
            Delivery::Random => "writes at any time",
            Delivery::Late => "late writes",
        };
        write!(f, "seed {}: {order}, {delivery}", self.seed)
    }
}

/// Chooses CTAs by an order.
pub(super) struct Chooser {
    order: Order,
    /// The one that is behind or ahead.
    favourite: usize,
    /// Place in the list, lowest first.
    rank: Vec<usize>,
}

impl Chooser {
    pub(super) fn new(order: Order, mesh: &Mesh, random: &mut Random) -> Chooser {
        let mut list: Vec<usize> = (0..mesh.ctas).collect();
        random.shuffle(&mut list);
        if order == Order::GroupsApart {
            // CTAs without a part of the layers are a group, too.
            let mut groups: Vec<usize> = (0..=mesh.groups).collect();
            random.shuffle(&mut groups);
            list = (0..mesh.ctas)
                .map(|cta| groups[(cta / mesh.members.max(1)).min(mesh.groups)])
                .collect();
        }
        Chooser {
            order,
            favourite: random.below(mesh.ctas),
            rank: list,
        }
    }

    /// Whether it would rather see writes delivered than let one of these go on.
    pub(super) fn holds_back(&self, able: &[usize]) -> bool {
        match self.order {
            Order::OneBehind => able.iter().all(|&cta| cta == self.favourite),
            Order::Uniform
            | Order::OneAhead
            | Order::GroupsApart
            | Order::NewestFirst
            | Order::Reversal => able.is_empty(),
        }
    }

    /// The index of one of these CTAs; `since`: when each came to be able to go on.
    pub(super) fn choose(
        &mut self,
        able: &[usize],
        since: &[u64],
        random: &mut Random,
    ) -> Option<usize> {
        if able.is_empty() {
            return None;
        }
        if self.order == Order::Reversal && random.once_in(64) {
            let last = self.rank.len();
            self.rank.iter_mut().for_each(|rank| *rank = last - *rank);
        }
        let any = random.below(able.len());
        let favourite = able.iter().position(|&cta| cta == self.favourite);
        // From a random one on, so that the first of several equal ones is any of them.
        let around = || (any..able.len()).chain(0..any);
        match self.order {
            Order::Uniform => Some(any),
            Order::OneAhead => favourite.or(Some(any)),
            Order::OneBehind => around().find(|&i| able[i] != self.favourite).or(favourite),
            Order::GroupsApart | Order::Reversal => around().min_by_key(|&i| self.rank[able[i]]),
            Order::NewestFirst => around().max_by_key(|&i| since[able[i]]),
        }
    }
}
