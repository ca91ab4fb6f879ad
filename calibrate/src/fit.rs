//! What is measured, and the constants that follow from it.

use std::fmt;

use anyhow::Result;
use mirage_compiler::calibration::{
    BARRIER, EXCHANGE_PAGE, LinearShape, exchange_entry, stream_entry,
};
use mirage_compiler::cost::{
    AttentionConstants, ExchangeConstants, LinearConstants, Machine, StreamConstants, Waits,
};
use mirage_compiler::program::TILE_BYTES;

use crate::bench::{Bench, Work};

/// Repetitions inside a kernel of exchanges, of linears, of barriers, and of the whole stream.
const EXCHANGES: u32 = 400;
const LINEARS: u32 = 40;
const BARRIERS: u32 = 1000;
const STREAMS: u32 = 1;
/// Bytes that a CTA uses up between two exchanges: about what a small model's layer does.
const BETWEEN: usize = 64 << 10;

const SIZES: usize = ExchangeConstants::WORDS.len();
type Curve = [f64; SIZES];
const PAGE_BYTES: [usize; 3] = StreamConstants::PAGE_BYTES;
const IN_FLIGHT: [usize; 5] = StreamConstants::IN_FLIGHT;

/// All times. Clocks of an SM where they are not of the whole GPU.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Measurements {
    clock_mhz: f64,
    /// Clocks of the slowest CTA over those of the average one.
    slowest: f64,
    /// GB/s, by page and by pages in flight.
    streams: [[f64; IN_FLIGHT.len()]; PAGE_BYTES.len()],
    /// Clocks of waiting, from a group and from the grid.
    waits: [Waits; 2],
    /// Clocks.
    barrier: f64,
    /// Clocks of few pages and of many.
    large: [f64; 2],
    small: [f64; 2],
    wide: [f64; 2],
    two_passes: f64,
}

impl Measurements {
    /// How many there are.
    pub(crate) const COUNT: usize = IN_FLIGHT.len() * PAGE_BYTES.len() + 2 * 4 * SIZES + 1 + 7;

    /// Takes them all; `progress` hears of each when it is done.
    pub(crate) fn take(bench: &mut Bench, mut progress: impl FnMut(&str)) -> Result<Measurements> {
        let (sms, ctas) = (bench.sms, bench.ctas);
        let all = Work {
            rounds: STREAMS,
            producers: ctas,
            pages: 0,
            ctas: sms,
        };
        let mut streams = [[0.0; IN_FLIGHT.len()]; PAGE_BYTES.len()];
        let (mut clock_mhz, mut slowest) = (0.0, 1.0);
        for (page_bytes, rates) in PAGE_BYTES.into_iter().zip(&mut streams) {
            for (in_flight, rate) in IN_FLIGHT.into_iter().zip(rates) {
                let launch = bench.run(&stream_entry(page_bytes, in_flight), all)?;
                let bytes = bench.streamed() as f64 * f64::from(STREAMS);
                *rate = bytes / (launch.milliseconds * 1e6);
                if let Some([clocks, nanoseconds]) = launch.clocks.first() {
                    clock_mhz = *clocks as f64 * 1e3 / (*nanoseconds).max(1) as f64;
                }
                slowest = launch.slowest();
                progress("stream");
            }
        }
        let mut curve = |producers: usize, in_flight: usize| -> Result<Curve> {
            let mut times = [0.0; SIZES];
            for (words, time) in ExchangeConstants::WORDS.into_iter().zip(&mut times) {
                let pages = match in_flight {
                    0 => 0,
                    _ => BETWEEN / EXCHANGE_PAGE,
                };
                let work = Work {
                    rounds: EXCHANGES,
                    producers,
                    pages: u32::try_from(pages)?,
                    ctas,
                };
                // When idle, the ring is there and nobody fills it.
                let entry = exchange_entry(words, in_flight.max(ExchangeConstants::IN_FLIGHT[0]));
                *time = bench.run(&entry, work)?.clocks_of_round(1, EXCHANGES);
                progress("exchange");
            }
            Ok(times)
        };
        let mut waits = |producers: usize| -> Result<Waits> {
            let idle = curve(producers, 0)?;
            let mut beside = [idle; 3];
            for (in_flight, times) in ExchangeConstants::IN_FLIGHT.into_iter().zip(&mut beside) {
                *times = curve(producers, in_flight)?;
            }
            Ok(Waits { idle, beside })
        };
        let waits = [waits(ExchangeConstants::GROUP)?, waits(ctas)?];
        let of_grid = |rounds: u32| Work {
            rounds,
            producers: ctas,
            pages: 0,
            ctas,
        };
        let barrier = bench.run(BARRIER, of_grid(BARRIERS))?;
        progress("barrier");
        let mut linear = |shape: LinearShape| -> Result<f64> {
            let launch = bench.run(&shape.entry(), of_grid(LINEARS))?;
            progress("linear");
            Ok(launch.clocks_of_round(0, LINEARS))
        };
        let mut pair = |[few, many]: [LinearShape; 2]| -> Result<[f64; 2]> {
            Ok([linear(few)?, linear(many)?])
        };
        Ok(Measurements {
            clock_mhz,
            slowest,
            streams,
            waits,
            barrier: barrier.clocks_of_round(0, BARRIERS),
            large: pair(LinearShape::LARGE)?,
            small: pair(LinearShape::SMALL)?,
            wide: pair(LinearShape::WIDE)?,
            two_passes: linear(LinearShape::TWO_PASSES)?,
        })
    }

    /// The constants. What no kernel here measures takes the clocks that it takes on the GPU of `known`; the search's are its.
    pub(crate) fn machine(&self, known: &Machine) -> Machine {
        let us = |clocks: f64| clocks / self.clock_mhz;
        let curve = |clocks: Curve| clocks.map(us);
        let waits = |waits: &Waits| Waits {
            idle: curve(waits.idle),
            beside: waits.beside.map(curve),
        };
        let [group, grid] = &self.waits;
        let scaled = |time: f64| us(time * known.clock_mhz);
        Machine {
            clock_mhz: self.clock_mhz,
            stream: StreamConstants {
                gbps: self.streams.iter().flatten().copied().fold(0.0, f64::max),
                rings: self.streams,
                slowest: self.slowest,
                disturbed: known.stream.disturbed,
            },
            linear: self.linear(),
            exchange: ExchangeConstants {
                grid: waits(grid),
                group: waits(group),
                sum: scaled(known.exchange.sum),
                scatter: scaled(known.exchange.scatter),
                barrier: us(self.barrier),
            },
            attention: AttentionConstants {
                task: scaled(known.attention.task),
                stripe: scaled(known.attention.stripe),
                block: scaled(known.attention.block),
            },
            search: known.search,
            column: scaled(known.column),
        }
    }

    /// A page's time is `page + bytes / rate`, and with twice the products `page + products / rate`; two sizes of pages tell
    /// the two apart. What is left of a linear is its beginning and its passes.
    fn linear(&self) -> LinearConstants {
        let us = |clocks: f64| clocks / self.clock_mhz;
        let page = |[few, many]: [f64; 2], [a, b]: [LinearShape; 2]| {
            us(many - few) / (b.pages as f64 - a.pages as f64)
        };
        let large = page(self.large, LinearShape::LARGE);
        let small = page(self.small, LinearShape::SMALL);
        let wide = page(self.wide, LinearShape::WIDE);
        let bytes = LinearShape::LARGE[0].page_bytes as f64;
        let less = LinearShape::SMALL[0].page_bytes as f64;
        // Where the smaller page is not cheaper, all of it is the page's.
        let of_byte = ((large - small) / (bytes - less)).max(large / bytes / 16.0);
        let fixed_of_page = (large - of_byte * bytes).max(large / 16.0);
        let products = 2.0 * bytes / TILE_BYTES as f64;
        let of_products = (wide - fixed_of_page).max(of_byte * bytes);
        let two_pages = us(self.large[0]) + large;
        let pass = (us(self.two_passes) - two_pages).max(large / 16.0);
        let fixed = us(self.large[0]) - large - pass;
        LinearConstants {
            fixed: fixed.max(large / 16.0),
            pass,
            page: fixed_of_page,
            shared_gbps: 1e-3 / of_byte,
            mma_mhz: products / of_products,
        }
    }
}

impl fmt::Display for Measurements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "stream, GB/s by pages in flight {IN_FLIGHT:?}")?;
        for (bytes, rates) in PAGE_BYTES.iter().zip(&self.streams) {
            write!(f, "  pages of {bytes:>5} B ")?;
            rates.iter().try_for_each(|rate| write!(f, " {rate:6.0}"))?;
            writeln!(f)?;
        }
        writeln!(
            f,
            "  the slowest CTA takes {:.3} times the average",
            self.slowest
        )?;
        writeln!(
            f,
            "exchange, clocks by words a CTA reads {:?}",
            ExchangeConstants::WORDS
        )?;
        for (name, waits) in ["group", "grid"].into_iter().zip(&self.waits) {
            let beside = ExchangeConstants::IN_FLIGHT.into_iter().zip(waits.beside);
            for (in_flight, times) in [(0, waits.idle)].into_iter().chain(beside) {
                write!(f, "  {name:5} beside {:2} KB in flight ", in_flight >> 10)?;
                times.iter().try_for_each(|time| write!(f, " {time:6.0}"))?;
                writeln!(f)?;
            }
        }
        writeln!(f, "barrier, clocks\n  {:.0}", self.barrier)?;
        writeln!(f, "linear, clocks of few pages and of more")?;
        for (name, times) in [
            ("16 KB", self.large),
            ("8 KB", self.small),
            ("16 columns", self.wide),
        ] {
            writeln!(f, "  {name:10}  {:6.0} {:6.0}", times[0], times[1])?;
        }
        writeln!(f, "  two passes  {:6.0}", self.two_passes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirage_compiler::profile::Profile;

    /// What would be measured on a machine with these constants, at 1000 MHz.
    fn measurements(linear: &LinearConstants) -> Measurements {
        let of = |shape: LinearShape| {
            let tiles = shape.passes * shape.pages * shape.page_bytes / TILE_BYTES;
            let read = (tiles * TILE_BYTES) as f64 / (linear.shared_gbps * 1e3);
            let multiply = (tiles * shape.columns.div_ceil(8)) as f64 / linear.mma_mhz;
            let pages = (shape.passes * shape.pages) as f64 * linear.page + read.max(multiply);
            1e3 * (linear.fixed + shape.passes as f64 * linear.pass + pages)
        };
        let waits = Waits {
            idle: [1e3; SIZES],
            beside: [[2e3; SIZES], [3e3; SIZES], [4e3; SIZES]],
        };
        let mut streams = [[3000.0; IN_FLIGHT.len()]; PAGE_BYTES.len()];
        streams[PAGE_BYTES.len() - 1][0] = 1000.0;
        Measurements {
            clock_mhz: 1000.0,
            slowest: 1.1,
            streams,
            waits: [waits, waits],
            barrier: 1500.0,
            large: LinearShape::LARGE.map(of),
            small: LinearShape::SMALL.map(of),
            wide: LinearShape::WIDE.map(of),
            two_passes: of(LinearShape::TWO_PASSES),
        }
    }

    #[track_caller]
    fn close(found: f64, expect: f64) {
        assert!(
            (found - expect).abs() < 1e-6 * expect,
            "{found}, not {expect}"
        );
    }

    const LINEAR: LinearConstants = LinearConstants {
        fixed: 0.2,
        pass: 0.3,
        page: 0.05,
        shared_gbps: 200.0,
        mma_mhz: 400.0,
    };

    #[test]
    fn constants_are_found_again() {
        let known = Profile::h100().machine;
        let machine = measurements(&LINEAR).machine(&known);
        for (found, expect) in [
            (machine.linear.fixed, LINEAR.fixed),
            (machine.linear.pass, LINEAR.pass),
            (machine.linear.page, LINEAR.page),
            (machine.linear.shared_gbps, LINEAR.shared_gbps),
            (machine.linear.mma_mhz, LINEAR.mma_mhz),
            (machine.stream.gbps, 3000.0),
            (machine.stream.rings[2][0], 1000.0),
            (machine.stream.slowest, 1.1),
            (machine.exchange.grid.idle[0], 1.0),
            (machine.exchange.group.beside[2][SIZES - 1], 4.0),
            (machine.exchange.barrier, 1.5),
            (
                machine.attention.task,
                known.attention.task * known.clock_mhz / 1e3,
            ),
        ] {
            close(found, expect);
        }
    }

    #[test]
    fn noise_makes_no_constant_that_is_none() {
        let mut noisy = measurements(&LINEAR);
        noisy.small = noisy.large;
        noisy.wide = noisy.large;
        noisy.two_passes = 0.0;
        let profile = Profile {
            machine: noisy.machine(&Profile::h100().machine),
            ..Profile::h100()
        };
        assert_eq!(Profile::parse(&profile.to_ron(), "x.ron"), Ok(profile));
    }
}
