//! `mirage-calibrate`: measures what the parts of this machine's GPU cost, and writes it down for the compiler.
//!
//! Owns the command line and what a run says. The kernels are the compiler's (`mirage_compiler::calibration`), launching
//! them is `bench.rs`'s, and `fit.rs` makes constants of the times.

mod bench;
mod fit;

use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use mirage_compiler::profile::Profile;
use mirage_runtime::gpu::Gpu;

use bench::Bench;
use fit::Measurements;

const EXAMPLES: &str = "\
Examples:
  mirage-calibrate                                          measure the first GPU, write profile.ron
  mirage-compile graphs/qwen3.ron --profile profile.ron     plan with what was measured
  mirage-bench --profile profile.ron                        the same, and compare the prediction with the time

What is measured, with the megakernel's own headers:
  stream     pages of weights from memory into shared memory, by their size and how many are in flight
  exchange   words from CTA to CTA, by how many a CTA reads, from a group and from the grid, alone and beside the stream
  linear     pages used up, sums over the warps, epilogues
  barrier    all CTAs wait for each other

Nothing else should run on the GPU meanwhile. It takes some seconds, most of it for compiling the kernels the first time.
Exit code 1: there is no GPU, no NVRTC, or the file cannot be written; stderr says which, and the mend.";

/// Measures what the parts of this machine's GPU cost, and writes a profile that the compiler plans with.
///
/// Without a profile the compiler takes the constants of an H100, scaled by memory bandwidth.
#[derive(Parser)]
#[command(name = "mirage-calibrate", version, after_help = EXAMPLES)]
struct Args {
    /// Where the profile goes.
    #[arg(short, long, value_name = "FILE", default_value = "profile.ron")]
    out: PathBuf,

    /// Which of the visible GPUs.
    #[arg(long, value_name = "N", default_value_t = 0)]
    gpu: usize,

    /// Print every time that was measured, not only the profile.
    #[arg(long, short)]
    verbose: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // If stderr is gone there is nobody left to tell; the exit code still does.
            let _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let gpu = Gpu::open(args.gpu)?;
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message("compiling");
    bar.tick();
    let mut bench = Bench::new(&gpu)?;
    bar.set_length(Measurements::COUNT as u64);
    let measured = Measurements::take(&mut bench, |what| {
        bar.set_message(what.to_owned());
        bar.inc(1);
    })?;
    bar.finish_and_clear();

    let shipped = Profile::h100();
    let machine = measured.machine(&shipped.machine);
    let properties = gpu.properties();
    let facts = properties.model()?;
    let driver = properties.driver_version;
    let profile = Profile {
        gpu: properties.name.clone(),
        compute_capability: properties.compute_capability,
        sms: facts.sms,
        smem_per_block_optin: facts.smem_per_block_optin,
        l2_bytes: facts.l2_bytes,
        measured: format!(
            "{}, mirage-calibrate {}, driver interface {}.{}",
            jiff::Zoned::now().date(),
            env!("CARGO_PKG_VERSION"),
            driver / 1000,
            driver % 1000 / 10
        ),
        machine,
    };
    let text = profile.to_ron();
    // What it says must be of use to the compiler: a constant that is none shows here and not there.
    Profile::parse(&text, &args.out.to_string_lossy())
        .context("what was measured makes no profile")?;
    fs::write(&args.out, &text).with_context(|| {
        format!(
            "{} cannot be written; -o takes another file",
            args.out.display()
        )
    })?;
    let mut out = io::stdout().lock();
    if args.verbose {
        write!(out, "{measured}")?;
    }
    writeln!(
        out,
        "{}: {:.0} GB/s at {:.0} MHz\nwrote {file}; give it to mirage-compile or mirage-bench with --profile {file}",
        profile.gpu,
        machine.stream.gbps,
        machine.clock_mhz,
        file = args.out.display(),
    )?;
    Ok(())
}
