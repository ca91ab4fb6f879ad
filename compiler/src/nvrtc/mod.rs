//! NVRTC: CUDA source in, cubin out, with no GPU and no CUDA toolkit.
//!
//! Owns finding and loading libnvrtc (12.x and 13.x), the options every compilation
//! has, and turning its answers into ours. It must not know what the source means,
//! and it must not cache: [`crate::cubin_cache`] does.
//!
//! With the cache it is the one part of the compiler library that reaches outside the process
//! (it opens a library; [`Nvrtc::find`] lists where it looks), and no stage uses it. All files
//! of the source are handed over in memory, and nothing is written.
//!
//! Threads: an [`Nvrtc`] may be shared and called from any thread. Compilations of one
//! process run one after the other under a lock of ours, so nothing is relied on that
//! NVIDIA does not promise for the versions accepted here.

mod ffi;
mod find;
mod resources;

use std::ffi::CString;
use std::fmt;
use std::path::{Path, PathBuf};

pub use resources::KernelResources;

use crate::arch::Arch;
use find::Surroundings;

/// Lines of a compile log that an error shows: the first errors are the ones that matter.
const LOG_LINES: usize = 40;

/// First version that keeps compilations in a cache of its own, and knows `--no-cache`. A cubin from that cache
/// comes without ptxas' report, and so would pass for one without kernels.
const NO_CACHE_SINCE: (i32, i32) = (12, 9);

/// A CUDA source with the headers it includes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The name that messages give, e.g. `kernel.cu`.
    pub name: String,
    /// The source text.
    pub text: String,
    /// Include name (as written in `#include "…"`) and text of every header.
    pub headers: Vec<(String, String)>,
}

/// What a caller may choose about a compilation. The rest is fixed: C++17, functions
/// without an execution space are device functions, IEEE arithmetic (no fast-math
/// unless `extra` asks for it).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Source lines in the cubin, for profilers. Costs no speed.
    pub line_info: bool,
    /// Further NVRTC options, e.g. `--maxrregcount=255`.
    pub extra: Vec<String>,
}

impl Options {
    /// The full list that NVRTC of a version, such as `(13, 0)`, is given for `arch`, in order: what a cache must key on.
    pub fn arguments(&self, arch: Arch, version: (i32, i32)) -> Vec<String> {
        let mut arguments = vec![
            format!("--gpu-architecture={arch}"),
            "--std=c++17".to_owned(),
            "--device-as-default-execution-space".to_owned(),
            "--ptxas-options=-v".to_owned(),
        ];
        if version >= NO_CACHE_SINCE {
            arguments.push("--no-cache".to_owned());
        }
        if self.line_info {
            arguments.push("--generate-line-info".to_owned());
        }
        arguments.extend(self.extra.iter().cloned());
        arguments
    }
}

/// A compiled program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// The binary that the driver loads.
    pub cubin: Vec<u8>,
    /// The PTX that the binary was assembled from, as text; `None` where it was not kept.
    pub ptx: Option<Vec<u8>>,
    /// Warnings and remarks, without the statistics in `resources`. Mostly empty.
    pub log: String,
    /// What each kernel uses, in the order of ptxas' report.
    pub resources: Vec<KernelResources>,
}

/// A loaded NVRTC library.
pub struct Nvrtc {
    api: ffi::Api,
    path: PathBuf,
}

impl Nvrtc {
    /// Finds and loads the library. In this order:
    ///
    /// 1. `MIRAGE_NVRTC`: the library or its folder. If it is set, it is the only place.
    /// 2. A wheel in the active virtual environment (`VIRTUAL_ENV`).
    /// 3. A wheel in `.venv` of the current folder, or of the project around it or around
    ///    this executable.
    /// 4. A wheel in the folders that `python3` imports from.
    /// 5. `CUDA_HOME`, `CUDA_PATH`, `/usr/local/cuda`.
    /// 6. The loader's path.
    ///
    /// A library that does not load, or is older than 12.0, is passed over.
    ///
    /// # Errors
    ///
    /// [`NvrtcError::NotFound`] with all places and what was there, or
    /// [`NvrtcError::Unusable`] for a `MIRAGE_NVRTC` that does not work.
    pub fn find() -> Result<Nvrtc, NvrtcError> {
        Nvrtc::find_around(&Surroundings::of_this_process())
    }

    fn find_around(around: &Surroundings) -> Result<Nvrtc, NvrtcError> {
        if let Some(chosen) = &around.mirage_nvrtc {
            let chosen = Path::new(chosen);
            let unusable = |reason| NvrtcError::Unusable {
                path: chosen.to_owned(),
                reason,
            };
            let library = if chosen.is_dir() {
                find::library_in(chosen).ok_or_else(|| {
                    unusable("the folder holds no libnvrtc.so.13 or libnvrtc.so.12".to_owned())
                })?
            } else {
                chosen.to_owned()
            };
            return Nvrtc::load(&library).map_err(unusable);
        }
        let mut looked = vec!["MIRAGE_NVRTC: not set".to_owned()];
        for step in &find::STEPS {
            let mut found = false;
            for library in (step.folders)(around)
                .iter()
                .filter_map(|folder| find::library_in(folder))
            {
                match Nvrtc::load(&library) {
                    Ok(nvrtc) => return Ok(nvrtc),
                    Err(reason) => looked.push(format!("{}: {reason}", step.label)),
                }
                found = true;
            }
            if !found {
                looked.push(format!("{}: not there", step.label));
            }
        }
        let mut reasons = Vec::new();
        for name in find::loader_names() {
            match Nvrtc::load(&name) {
                Ok(nvrtc) => return Ok(nvrtc),
                Err(reason) => reasons.push(reason),
            }
        }
        looked.push(format!("the loader's path: {}", reasons.join("; ")));
        Err(NvrtcError::NotFound { looked })
    }

    /// Loads one library; a bare file name is searched on the loader's path.
    fn load(library: &Path) -> Result<Nvrtc, String> {
        let api = ffi::Api::open(library)?;
        let (major, minor) = api.version();
        if u32::try_from(major).map_or(true, |major| major < find::OLDEST_MAJOR) {
            return Err(format!(
                "{} is NVRTC {major}.{minor}, too old: 12.0 or newer is needed",
                library.display()
            ));
        }
        if let Some(folder) = library
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty())
        {
            api.preload_builtins(folder)?;
        }
        Ok(Nvrtc {
            api,
            path: library.to_owned(),
        })
    }

    /// Major and minor version, e.g. `(13, 0)`.
    pub fn version(&self) -> (i32, i32) {
        self.api.version()
    }

    /// The library, as it was given to the loader: a bare name where the loader found it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The architectures this version compiles for, as compute capability times ten.
    pub fn supported_archs(&self) -> Vec<u32> {
        self.api.supported_archs().to_vec()
    }

    /// Compiles a program for one architecture.
    ///
    /// # Errors
    ///
    /// [`NvrtcError::UnsupportedArch`], [`NvrtcError::Compile`] for errors of the source,
    /// [`NvrtcError::InvalidSource`], or [`NvrtcError::Call`] for anything else that NVRTC
    /// refuses (an unknown option, missing built-ins, no memory).
    pub fn compile(
        &self,
        source: &Source,
        arch: Arch,
        options: &Options,
    ) -> Result<Compiled, NvrtcError> {
        if !self.api.supported_archs().contains(&arch.capability()) {
            let supported = self.supported_archs();
            return Err(NvrtcError::UnsupportedArch {
                arch,
                version: self.version(),
                supported,
            });
        }
        let name = c_string("the source's name", &source.name)?;
        let text = c_string(&source.name, &source.text)?;
        let headers = source
            .headers
            .iter()
            .map(|(name, text)| Ok((c_string("a header's name", name)?, c_string(name, text)?)))
            .collect::<Result<Vec<_>, NvrtcError>>()?;
        let arguments = options
            .arguments(arch, self.version())
            .iter()
            .map(|argument| c_string("an option", argument))
            .collect::<Result<Vec<_>, _>>()?;
        match self.api.compile(&name, &text, &headers, &arguments) {
            Ok(ffi::Outcome::Compiled {
                cubin,
                mut ptx,
                log,
            }) => {
                if ptx.last() == Some(&0) {
                    ptx.pop(); // NVRTC's text ends in NUL
                }
                let (resources, log) = resources::split(&log);
                Ok(Compiled {
                    cubin,
                    ptx: Some(ptx),
                    log,
                    resources,
                })
            }
            Ok(ffi::Outcome::Rejected { log }) => {
                let (_, log) = resources::split(&log);
                Err(NvrtcError::Compile {
                    name: source.name.clone(),
                    arch,
                    log: shorten(&log),
                })
            }
            Err(refusal) => Err(NvrtcError::Call {
                call: refusal.call,
                message: refusal.message,
            }),
        }
    }
}

impl fmt::Debug for Nvrtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nvrtc")
            .field("path", &self.path)
            .field("version", &self.version())
            .finish()
    }
}

/// Why there is no cubin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NvrtcError {
    /// No usable library anywhere.
    #[error(
        "NVRTC, CUDA's run-time compiler, was not found\n  {}\n\
         install it (no GPU needed): python3 -m venv .venv && .venv/bin/pip install 'nvidia-cuda-nvrtc==13.0.*'\n\
         or set MIRAGE_NVRTC to libnvrtc.so.13 or to its folder",
        .looked.join("\n  ")
    )]
    NotFound {
        /// One line for each place: where, and what was wrong there.
        looked: Vec<String>,
    },
    /// `MIRAGE_NVRTC` names something that cannot be used.
    #[error(
        "MIRAGE_NVRTC={}: {reason}; set it to libnvrtc.so.13 or to its folder, or unset it to search",
        .path.display()
    )]
    Unusable {
        /// The variable's value.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// This NVRTC does not know the architecture.
    #[error(
        "NVRTC {}.{} cannot compile for {arch} (it can for {}); install a newer one: pip install 'nvidia-cuda-nvrtc==13.0.*'",
        .version.0, .version.1,
        .supported.iter().map(|arch| format!("sm_{arch}")).collect::<Vec<_>>().join(", ")
    )]
    UnsupportedArch {
        /// What was asked for.
        arch: Arch,
        /// Of the library.
        version: (i32, i32),
        /// Compute capabilities times ten.
        supported: Vec<u32>,
    },
    /// The source has errors.
    #[error("{name} does not compile for {arch}:\n{log}")]
    Compile {
        /// The source's name.
        name: String,
        /// The architecture it was compiled for.
        arch: Arch,
        /// The compiler's messages, `kernel.cu(12): error: …`, the first ones.
        log: String,
    },
    /// A text cannot be handed to C.
    #[error("{what} holds a NUL byte at offset {offset}, which CUDA source cannot")]
    InvalidSource {
        /// Which text.
        what: String,
        /// Where in it.
        offset: usize,
    },
    /// NVRTC refused a call.
    #[error("{call} failed: {message}")]
    Call {
        /// The C function.
        call: &'static str,
        /// NVRTC's words.
        message: String,
    },
}

fn c_string(what: &str, text: &str) -> Result<CString, NvrtcError> {
    CString::new(text).map_err(|error| NvrtcError::InvalidSource {
        what: what.to_owned(),
        offset: error.nul_position(),
    })
}

/// The first lines of a long log.
fn shorten(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    if lines.len() <= LOG_LINES {
        return log.to_owned();
    }
    format!(
        "{}\n... and {} more lines",
        lines[..LOG_LINES].join("\n"),
        lines.len() - LOG_LINES
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chosen_library_that_does_not_work_is_not_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let find = |chosen: &Path| {
            let around = Surroundings {
                mirage_nvrtc: Some(chosen.into()),
                ..Default::default()
            };
            Nvrtc::find_around(&around).unwrap_err().to_string()
        };
        let empty = find(folder.path());
        assert!(
            empty.contains("the folder holds no libnvrtc.so.13"),
            "{empty}"
        );
        assert!(empty.contains("MIRAGE_NVRTC="), "{empty}");
        let library = folder.path().join("libnvrtc.so.13");
        std::fs::write(&library, "not a library").unwrap();
        for chosen in [folder.path(), &library] {
            assert!(
                find(chosen).contains("libnvrtc.so.13: "),
                "{}",
                find(chosen)
            );
        }
        let gone = find(Path::new("/nowhere/libnvrtc.so"));
        assert!(gone.contains("No such file"), "{gone}");
    }

    #[test]
    fn long_logs_are_shortened() {
        assert_eq!(shorten("a\nb"), "a\nb");
        let long = shorten(&"line\n".repeat(LOG_LINES + 2));
        assert_eq!(long.lines().count(), LOG_LINES + 1);
        assert!(long.ends_with("... and 2 more lines"), "{long}");
    }
}
