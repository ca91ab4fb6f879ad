//! A CTA's ring as time goes by: when its pages arrive, and when the stream has to stop because it is full.
//!
//! Owns the times of single pages. It is told when pages are wanted and never what for.

/// Pages of one CTA, in the order in which they are used, again and again.
pub(super) struct RingWalk {
    /// Bytes of the pages of a layer.
    pages: Vec<usize>,
    /// For each of these: from one to the next while the stream runs, and from asking to arriving where it had stopped.
    times: Vec<Arrival>,
    /// Pages of the ring.
    room: usize,
    /// When each page so far arrived, and when it was used up. More have arrived than were used.
    arrived: Vec<f64>,
    used: Vec<f64>,
}

/// How long a page takes.
#[derive(Clone, Copy)]
pub(super) struct Arrival {
    /// After the page before it.
    pub(super) next: f64,
    /// After it was asked for.
    pub(super) first: f64,
}

impl RingWalk {
    /// A full ring at time zero.
    pub(super) fn new(pages: Vec<usize>, room: usize, time: impl Fn(usize) -> Arrival) -> RingWalk {
        RingWalk {
            times: pages.iter().map(|&bytes| time(bytes)).collect(),
            pages,
            room,
            arrived: vec![0.0; room],
            used: Vec::new(),
        }
    }

    /// When page `index` arrives; the one that has to make room for it has been used.
    fn arrival(&mut self, index: usize) -> f64 {
        while self.arrived.len() <= index {
            let at = self.arrived.len();
            let time = self.times[at % self.times.len()];
            let room = self.used[at - self.room] + time.first;
            let previous = self.arrived[at - 1] + time.next;
            self.arrived.push(room.max(previous));
        }
        self.arrived[index]
    }

    /// Uses up the next page at `now` or once it is there, in so much time; gives the time afterwards.
    pub(super) fn take(&mut self, now: f64, work: impl Fn(usize) -> f64) -> f64 {
        let index = self.used.len();
        let bytes = self.pages[index % self.pages.len()];
        let done = self.arrival(index).max(now) + work(bytes);
        self.used.push(done);
        done
    }

    /// When the ring is full again if nothing more is used.
    pub(super) fn full_at(&mut self) -> f64 {
        self.arrival(self.used.len() + self.room - 1)
    }

    /// Something else is read for so long: what has not arrived by `now` comes later.
    pub(super) fn stand_back(&mut self, now: f64, time: f64) {
        for arrived in &mut self.arrived {
            if *arrived > now {
                *arrived += time;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring() -> RingWalk {
        let time = |_| Arrival {
            next: 1.0,
            first: 3.0,
        };
        RingWalk::new(vec![512], 2, time)
    }

    #[test]
    fn what_is_there_is_used_at_once_and_the_rest_is_waited_for() {
        let mut ring = ring();
        let mut now = 0.0;
        let mut times = Vec::new();
        for _ in 0..5 {
            now = ring.take(now, |_| 0.5);
            times.push(now);
        }
        // Two pages lay there. The third was asked for when the first was used, at 0.5, and its latency is 3.
        assert_eq!(times, [0.5, 1.0, 4.0, 5.0, 7.5]);
        assert_eq!(ring.full_at(), 10.5);
    }

    #[test]
    fn other_reads_make_it_wait() {
        let mut ring = ring();
        ring.take(0.0, |_| 0.5);
        assert_eq!(ring.full_at(), 3.5);
        ring.stand_back(1.0, 2.0);
        assert_eq!(ring.full_at(), 5.5);
        ring.stand_back(6.0, 2.0);
        assert_eq!(ring.full_at(), 5.5);
    }
}
