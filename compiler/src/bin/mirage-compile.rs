//! `mirage-compile`: a decoder's graph in, one CUDA kernel out.
//!
//! Owns the command line, reading and writing files, and the summary for people. It must
//! not decide anything about the kernel: the library's stages do.
//!
//! Results go to stdout, errors to stderr. Exit codes: see `EXIT_CODES`, which `--help`
//! prints.

use std::fmt::{self, Write as _};
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use clap::builder::RangedU64ValueParser;
use mirage_compiler::arch::{Arch, GpuModel};
use mirage_compiler::diagnostics::Diagnostics;
use mirage_compiler::fuse::FusedGraph;
use mirage_compiler::graph::Graph;
use mirage_compiler::typed::{ModelConfig, TypedGraph};

/// Largest batch that the kernel's mma tiles hold.
const MAX_BATCH: u64 = 16;

/// Longest context that `--max-seq` takes, in tokens: more than any Qwen3 was trained for.
const MAX_SEQ: u64 = 1 << 20;

const EXAMPLES: &str = "\
Examples:
  mirage-compile graphs/qwen3.ron                          Qwen3-0.6B for an H100
  mirage-compile graphs/qwen3.ron --model ~/Qwen3-8B       the sizes of a checkpoint
  mirage-compile graphs/qwen3.ron --arch sm_80 --batch 8   for an A100, eight sequences at once";

const EXIT_CODES: &str = "\
Exit codes:
  0  everything was written
  1  the graph, the checkpoint or the output folder is at fault; stderr says where, and the mend
  2  the command line is at fault
  3  the CUDA source was written, but no cubin: NVRTC is missing; stderr says what to install

Environment:
  MIRAGE_NVRTC      libnvrtc.so.13 or its folder, where it is in no usual place
  MIRAGE_CACHE_DIR  where cubins are kept [default: $XDG_CACHE_HOME/mirage, ~/.cache/mirage]";

/// Compiles a decoder's operator graph into one persistent CUDA kernel.
///
/// Needs no GPU and no CUDA toolkit.
#[derive(Parser)]
#[command(name = "mirage-compile", version, after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
struct Args {
    /// The operators of the decoder, e.g. graphs/qwen3.ron.
    graph: PathBuf,

    /// Checkpoint folder in the Hugging Face layout; its config.json gives the sizes [default: those in GRAPH]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,

    /// GPU architecture to compile for: sm_80 (A100), sm_86 (RTX 3090), sm_89 (RTX 4090), sm_90a (H100, H200),
    /// sm_100a (B200) or sm_120a (RTX 5090).
    #[arg(long, default_value_t = Arch::Sm90a)]
    arch: Arch,

    /// Sequences that are generated at once, 1 to 16.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = RangedU64ValueParser::<u32>::new().range(1..=MAX_BATCH))]
    batch: u32,

    /// Longest sequence in tokens, prompt included: what the KV cache has room for.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = RangedU64ValueParser::<u32>::new().range(1..=MAX_SEQ))]
    max_seq: u32,

    /// Folder for the output, made if it is not there [default: out/ and the graph's name]
    #[arg(short, long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Why a run ends with exit code 1.
enum Failure {
    /// A file says something wrong, at places we can show.
    Diagnosed(Diagnostics),
    /// A file cannot be read or written.
    Files(String),
}

impl From<Diagnostics> for Failure {
    fn from(diagnostics: Diagnostics) -> Failure {
        Failure::Diagnosed(diagnostics)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Diagnosed(diagnostics) => f.write_str(diagnostics.to_string().trim_end()),
            Failure::Files(message) => write!(f, "error: {message}"),
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    match compile(&args).and_then(|summary| print(&summary)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // If stderr is gone there is nobody left to tell; the exit code still does.
            let _ = writeln!(io::stderr(), "{failure}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the stages, writes the output folder and returns the summary.
fn compile(args: &Args) -> Result<String, Failure> {
    let graph = Graph::parse(&read_graph(&args.graph)?, &args.graph.to_string_lossy())?;
    let typed = TypedGraph::new(&graph, &read_config(args.model.as_deref())?)?;
    let fused = FusedGraph::new(&typed)?;

    let out = args
        .out
        .clone()
        .unwrap_or_else(|| Path::new("out").join(&fused.name));
    let stages = [
        ("graph.txt", graph.to_string()),
        ("typed.txt", typed.to_string()),
        ("fused.txt", fused.to_string()),
    ];
    write_all(&out, &stages)?;

    let gpu = GpuModel::default_for(args.arch);
    let sizes = match &args.model {
        Some(folder) => format!("the sizes of {}", folder.join("config.json").display()),
        None => format!("the sizes in {}", args.graph.display()),
    };
    let operators: usize = fused.layer.iter().map(|node| node.sources.len()).sum();
    let mut summary = String::new();
    let mut line = |label: &str, text: fmt::Arguments| {
        // Writing to a String cannot fail.
        let _ = writeln!(summary, "{label:<8}{text}");
    };
    line(
        "model",
        format_args!(
            "{}, {} layers, {:.2} B parameters, {sizes}",
            fused.name,
            fused.layers,
            typed.parameters() as f64 / 1e9
        ),
    );
    line(
        "target",
        format_args!(
            "{} ({}, {} SMs), batch {}, up to {} tokens",
            args.arch, gpu.name, gpu.sms, args.batch, args.max_seq
        ),
    );
    line(
        "fused",
        format_args!("{operators} operators a layer into {}", fused.layer.len()),
    );
    line(
        "wrote",
        format_args!(
            "{}",
            stages
                .map(|(name, _)| out.join(name).display().to_string())
                .join(", ")
        ),
    );
    Ok(summary)
}

fn read_graph(path: &Path) -> Result<String, Failure> {
    read(path).map_err(|reason| {
        let mut message = format!("the graph {} cannot be read: {reason}", path.display());
        let others = graphs_beside(path);
        if !others.is_empty() {
            let _ = write!(message, "; in that folder there is {}", others.join(", "));
        }
        Failure::Files(message)
    })
}

fn read_config(model: Option<&Path>) -> Result<ModelConfig, Failure> {
    let Some(folder) = model else {
        return Ok(ModelConfig::none());
    };
    let path = folder.join("config.json");
    let text = read(&path).map_err(|reason| {
        Failure::Files(format!(
            "{} cannot be read: {reason}; --model takes a checkpoint's folder in the Hugging Face layout",
            path.display()
        ))
    })?;
    Ok(ModelConfig::parse(&text, &path.to_string_lossy())?)
}

/// A whole text file, or why not.
fn read(path: &Path) -> Result<String, String> {
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    String::from_utf8(bytes).map_err(|error| {
        format!(
            "it is not UTF-8 text (byte {} is not)",
            error.utf8_error().valid_up_to()
        )
    })
}

/// The graph files of the folder that a mistyped path names, sorted.
fn graphs_beside(path: &Path) -> Vec<String> {
    let folder = if path.is_dir() {
        Some(path)
    } else {
        path.parent()
    };
    // The parent of a bare file name is the empty path, which read_dir does not take.
    let folder = folder.map(|folder| {
        if folder.as_os_str().is_empty() {
            Path::new(".")
        } else {
            folder
        }
    });
    let entries = folder
        .and_then(|folder| fs::read_dir(folder).ok())
        .into_iter()
        .flatten()
        .flatten();
    let mut names: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "ron"))
        .filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        .collect();
    names.sort();
    names
}

/// Writes the files into the folder, which is made if it is not there.
fn write_all(folder: &Path, files: &[(&str, String)]) -> Result<(), Failure> {
    let fail = |path: &Path, error: io::Error| {
        Failure::Files(format!(
            "{} cannot be written: {error}; -o takes a folder that you can write to",
            path.display()
        ))
    };
    fs::create_dir_all(folder).map_err(|error| fail(folder, error))?;
    for (name, text) in files {
        let path = folder.join(name);
        fs::write(&path, text).map_err(|error| fail(&path, error))?;
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
