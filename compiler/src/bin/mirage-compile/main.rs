//! `mirage-compile`: a decoder's graph in, one CUDA kernel out.
//!
//! Owns what a run does and how it ends. It must not decide anything about the kernel: the library's stages do.
//!
//! Results go to stdout, errors and notes to stderr. Exit codes: see `args::EXIT_CODES`, which `--help` prints.

mod args;
mod files;
mod summary;
mod terminal;

use std::fmt::{self, Display};
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use mirage_compiler::arch::GpuModel;
use mirage_compiler::driver::{self, CompileError};
use mirage_compiler::plan::Target;

use args::Args;
use summary::{Cubin, Summary};
use terminal::Terminal;

/// Why a run ends without all that was asked for.
enum Failure {
    /// A stage cannot go on, or NVRTC is missing.
    Compile(CompileError),
    /// A file cannot be read or written.
    Files(String),
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Failure::Files(_)
            | Failure::Compile(CompileError::Diagnosed(_) | CompileError::Target { .. }) => 1,
            Failure::Compile(CompileError::Nvrtc(_)) => 3,
            Failure::Compile(CompileError::Fault(_)) => 4,
        }
    }
}

impl From<CompileError> for Failure {
    fn from(error: CompileError) -> Failure {
        Failure::Compile(error)
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // These begin with "error" and the rule's name themselves.
            Failure::Compile(CompileError::Diagnosed(diagnostics)) => {
                f.write_str(diagnostics.to_string().trim_end())
            }
            Failure::Compile(error) => write!(f, "error: {error}"),
            Failure::Files(message) => write!(f, "error: {message}"),
        }
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // If stderr is gone there is nobody left to tell; the exit code still does.
            let _ = writeln!(io::stderr(), "{failure}");
            ExitCode::from(failure.code())
        }
    }
}

/// Compiles, writes the output folder and prints the summary; the summary comes even where there is no cubin.
fn run(args: &Args) -> Result<(), Failure> {
    let start = Instant::now();
    let text = files::read_graph(&args.graph)?;
    let config = files::read_config(args.model.as_deref())?;
    let gpu = match &args.profile {
        Some(path) => files::read_profile(path)?,
        None => GpuModel::default_for(args.arch),
    };
    let target = Target {
        gpu,
        batch: args.batch as usize,
        max_seq: args.max_seq as usize,
    };
    let compilation = driver::compile(&text, &args.graph.to_string_lossy(), &config, &target)?;
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| Path::new("out").join(&compilation.fused.name));
    files::write_source(&out, &compilation)?;
    let to_source = start.elapsed();

    let terminal = Terminal::of_stdout();
    let start = Instant::now();
    let progress = terminal::progress(format_args!(
        "compiling {} for {} (a few seconds, once) ...",
        mirage_compiler::artifact::SOURCE_FILE,
        target.gpu.arch
    ));
    let built = compilation.build();
    drop(progress);
    let to_cubin = start.elapsed();

    let sizes = match &args.model {
        Some(folder) => format!("the sizes of {}", folder.join("config.json").display()),
        None => format!("the sizes in {}", args.graph.display()),
    };
    let cubin = match &built {
        Ok(build) => {
            files::write_artifact(&out, &build.artifact)?;
            Some(Cubin {
                build,
                time: to_cubin,
            })
        }
        Err(_) => None,
    };
    let summary = Summary {
        terminal,
        compilation: &compilation,
        sizes: &sizes,
        out: &out,
        to_source,
        cubin,
    };
    print(&summary.to_string())?;
    let build = built?;
    for note in [Some(build.log), build.not_kept].into_iter().flatten() {
        if !note.is_empty() {
            let _ = writeln!(io::stderr(), "note: {note}");
        }
    }
    Ok(())
}

/// Prints to stdout. A reader that went away (`| head`) has what it wanted.
fn print(text: &str) -> Result<(), Failure> {
    match io::stdout()
        .write_all(text.as_bytes())
        .and_then(|()| io::stdout().flush())
    {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::Files(format!("stdout cannot be written: {error}")))
        }
        _ => Ok(()),
    }
}
