//! What a run is given: files, prompts and the device, each with an error that says how to mend it.

use std::io;
use std::path::Path;

use anyhow::{Context, Result, bail};
use mirage_compiler::input::{self, InputError};
use mirage_compiler::profile::Profile;
use mirage_runtime::gpu::Gpu;

use crate::cli::{Args, BaselineName, DEFAULT_PROMPTS, DeviceChoice};
use crate::external::{self, External};
use crate::prompts::{self, Prompt};
use crate::report::json;
use crate::results::Results;

/// Largest result file that is read, in bytes. One of a long run has some hundred KB.
const MAX_RESULTS: usize = 64 << 20;

/// The prompts that come with the program.
const BUILT_IN_PROMPTS: &[u8] = include_bytes!("../../prompts/test_prompts.txt");

pub(super) fn read_results(file: &Path) -> Result<Results> {
    let text = input::read_text(file, MAX_RESULTS)
        .with_context(|| format!("--compare {} cannot be read", file.display()))?;
    Ok(json::read(&text, &file.to_string_lossy())?)
}

pub(super) fn read_external(file: &Path) -> Result<External> {
    let text = input::read_text(file, MAX_RESULTS)
        .with_context(|| format!("--external {} cannot be read", file.display()))?;
    Ok(external::read(&text, &file.to_string_lossy())?)
}

pub(super) fn read_profile(file: &Path) -> Result<Profile> {
    let text = input::read_text(file, input::MAX_TEXT)
        .with_context(|| format!("--profile {} cannot be read", file.display()))?;
    Ok(Profile::parse(&text, &file.to_string_lossy())?)
}

/// The prompt file's name for people, and its bytes.
pub(super) fn read_prompts(path: &Path) -> Result<(String, Vec<u8>)> {
    match input::read(path, prompts::MAX_FILE) {
        Ok(bytes) => Ok((path.display().to_string(), bytes)),
        Err(InputError::Io(error))
            if error.kind() == io::ErrorKind::NotFound && path == Path::new(DEFAULT_PROMPTS) =>
        {
            Ok((
                format!("{DEFAULT_PROMPTS} (built in)"),
                BUILT_IN_PROMPTS.to_vec(),
            ))
        }
        Err(error) => {
            bail!(
                "the prompts {} cannot be read: {error}; without --prompts the built-in ones are used",
                path.display()
            )
        }
    }
}

pub(super) fn of_categories(all: &[Prompt], wanted: &[String], file: &str) -> Result<Vec<Prompt>> {
    for name in wanted {
        if !all.iter().any(|prompt| prompt.category == *name) {
            let mut known: Vec<&str> = all.iter().map(|prompt| prompt.category.as_str()).collect();
            known.dedup();
            bail!("--categories {name}: {file} has {}", known.join(", "));
        }
    }
    let chosen = |prompt: &&Prompt| wanted.is_empty() || wanted.contains(&prompt.category);
    Ok(all.iter().filter(chosen).cloned().collect())
}

/// The GPU, or none for the CPU; with the reason where `auto` fell back to it.
pub(super) fn open_device(choice: DeviceChoice) -> Result<(Option<Gpu>, Option<String>)> {
    match choice {
        DeviceChoice::Cpu => Ok((None, None)),
        DeviceChoice::Cuda => match Gpu::open(0) {
            Ok(gpu) => Ok((Some(gpu), None)),
            Err(error) => bail!("--device cuda: {error}"),
        },
        DeviceChoice::Auto => match Gpu::open(0) {
            Ok(gpu) => Ok((Some(gpu), None)),
            Err(error) => Ok((None, Some(error.to_string()))),
        },
    }
}

pub(super) fn check_baselines(args: &Args, gpu: bool) -> Result<()> {
    for name in &args.baseline {
        match (name, gpu) {
            (BaselineName::Reference, true) => {
                bail!("--baseline reference runs on the CPU; add --device cpu")
            }
            (BaselineName::B0 | BaselineName::B1 | BaselineName::B2, false) => {
                bail!(
                    "--baseline b0, b1 and b2 need a GPU; on the CPU there is --baseline reference"
                )
            }
            (BaselineName::Reference, false)
            | (BaselineName::B0 | BaselineName::B1 | BaselineName::B2, true) => {}
        }
    }
    Ok(())
}
