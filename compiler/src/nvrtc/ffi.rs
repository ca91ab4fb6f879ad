//! The part of NVRTC's C interface that we call, loaded at run time.
//!
//! Owns the `unsafe` code around NVRTC. It must not search for the library
//! (`find`) or know what is compiled (`mod`).
//!
//! Why not cudarc's `nvrtc::sys`: it opens the first library with a fitting name on
//! the loader's path and panics where there is none, so it cannot be pointed at a
//! wheel; and it returns `nvrtcResult` as a Rust enum, which is undefined
//! behaviour for a code that a newer library adds. We keep codes as integers.

use std::error::Error;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use libloading::Library;

type Code = c_int;
type Program = *mut c_void;

/// `NVRTC_SUCCESS`
const SUCCESS: Code = 0;
/// `NVRTC_ERROR_COMPILATION`
const ERROR_COMPILATION: Code = 6;

/// One compilation at a time in this process.
///
/// NVIDIA's guide promises nothing about calls from several threads for the
/// versions that we accept (older ones share the parser's global state), and two
/// compilations at once would gain little: we compile one program per run.
static COMPILING: Mutex<()> = Mutex::new(());

/// Declares the table of entry points and how it is filled.
macro_rules! table {
    ($($field:ident: $symbol:literal fn($($argument:ty),*) -> $result:ty;)*) => {
        struct Table { $($field: unsafe extern "C" fn($($argument),*) -> $result,)* }

        impl Table {
            /// # Safety
            ///
            /// `library` must be an NVRTC library and must never be unloaded.
            unsafe fn load(library: &Library) -> Result<Table, libloading::Error> {
                // SAFETY: the types are those of nvrtc.h, unchanged from 11.1 to 13.x.
                Ok(Table { $($field: unsafe { *library.get($symbol)? },)* })
            }
        }
    };
}

table! {
    version: c"nvrtcVersion" fn(*mut c_int, *mut c_int) -> Code;
    num_supported_archs: c"nvrtcGetNumSupportedArchs" fn(*mut c_int) -> Code;
    supported_archs: c"nvrtcGetSupportedArchs" fn(*mut c_int) -> Code;
    error_string: c"nvrtcGetErrorString" fn(Code) -> *const c_char;
    create: c"nvrtcCreateProgram"
        fn(*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> Code;
    destroy: c"nvrtcDestroyProgram" fn(*mut Program) -> Code;
    compile: c"nvrtcCompileProgram" fn(Program, c_int, *const *const c_char) -> Code;
    log_size: c"nvrtcGetProgramLogSize" fn(Program, *mut usize) -> Code;
    log: c"nvrtcGetProgramLog" fn(Program, *mut c_char) -> Code;
    cubin_size: c"nvrtcGetCUBINSize" fn(Program, *mut usize) -> Code;
    cubin: c"nvrtcGetCUBIN" fn(Program, *mut c_char) -> Code;
    ptx_size: c"nvrtcGetPTXSize" fn(Program, *mut usize) -> Code;
    ptx: c"nvrtcGetPTX" fn(Program, *mut c_char) -> Code;
}

/// A loaded NVRTC library. Stays loaded until the process ends.
pub(super) struct Api {
    table: Table,
    version: (i32, i32),
    supported_archs: Vec<u32>,
}

/// A call that NVRTC refused.
#[derive(Debug)]
pub(super) struct Refusal {
    /// The C function.
    pub(super) call: &'static str,
    /// NVRTC's own words.
    pub(super) message: String,
}

/// What a compilation left behind.
pub(super) enum Outcome {
    /// The binary for the architecture, the PTX it came from, and the log.
    Compiled {
        cubin: Vec<u8>,
        ptx: Vec<u8>,
        log: String,
    },
    /// The source has errors: they are in the log.
    Rejected { log: String },
}

impl Api {
    /// Opens the library at `path` (or by bare name, on the loader's path).
    ///
    /// Errors in words: the loader's, a missing entry point's, or NVRTC's.
    pub(super) fn open(path: &Path) -> Result<Api, String> {
        let library = open_forever(path)?;
        // SAFETY: the caller names an NVRTC library and `open_forever` never unloads it.
        let table = unsafe { Table::load(library) }.map_err(|error| whole(&error))?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both pointers are valid for the call.
        table.check("nvrtcVersion", unsafe {
            (table.version)(&mut major, &mut minor)
        })?;
        let mut count = 0;
        // SAFETY: the pointer is valid for the call.
        table.check("nvrtcGetNumSupportedArchs", unsafe {
            (table.num_supported_archs)(&mut count)
        })?;
        let mut archs = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: NVRTC writes as many entries as it has just counted.
        table.check("nvrtcGetSupportedArchs", unsafe {
            (table.supported_archs)(archs.as_mut_ptr())
        })?;
        let supported_archs = archs
            .into_iter()
            .filter_map(|arch| u32::try_from(arch).ok())
            .collect();
        Ok(Api {
            table,
            version: (major, minor),
            supported_archs,
        })
    }

    /// Major and minor version.
    pub(super) fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compute capabilities times ten.
    pub(super) fn supported_archs(&self) -> &[u32] {
        &self.supported_archs
    }

    /// Loads the library of built-ins from `folder`, where it lies beside NVRTC.
    ///
    /// NVRTC opens `libnvrtc-builtins.so.MAJOR.MINOR` by bare name when it first
    /// compiles. The 13.0 wheel carries no RUNPATH (12.8 does), so the loader would
    /// not look beside NVRTC; once a library of that soname is loaded, by whatever
    /// path, the loader takes it. Where there is none in the folder, NVRTC may
    /// still find one by itself, so that is no error here.
    pub(super) fn preload_builtins(&self, folder: &Path) -> Result<(), String> {
        let (major, minor) = self.version;
        let path = folder.join(format!("libnvrtc-builtins.so.{major}.{minor}"));
        if path.is_file() {
            open_forever(&path).map(drop)
        } else {
            Ok(())
        }
    }

    /// Compiles one program.
    pub(super) fn compile(
        &self,
        name: &CStr,
        text: &CStr,
        headers: &[(CString, CString)],
        options: &[CString],
    ) -> Result<Outcome, Refusal> {
        // The lock guards no data, so a panic of another holder broke nothing.
        let _one_at_a_time = COMPILING.lock().unwrap_or_else(PoisonError::into_inner);
        let table = &self.table;
        let include_names: Vec<_> = headers.iter().map(|(name, _)| name.as_ptr()).collect();
        let header_texts: Vec<_> = headers.iter().map(|(_, text)| text.as_ptr()).collect();
        let mut program = Live {
            table,
            program: std::ptr::null_mut(),
        };
        // SAFETY: every pointer is to a live NUL-terminated string, and both arrays
        // are as long as the count says. NVRTC copies what it keeps.
        table.accept("nvrtcCreateProgram", unsafe {
            (table.create)(
                &mut program.program,
                text.as_ptr(),
                name.as_ptr(),
                length(headers.len()),
                header_texts.as_ptr(),
                include_names.as_ptr(),
            )
        })?;
        let option_pointers: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the program was just created; the options are as many as we say.
        let code = unsafe {
            (table.compile)(
                program.program,
                length(options.len()),
                option_pointers.as_ptr(),
            )
        };
        let log = program.bytes("nvrtcGetProgramLog", table.log_size, table.log)?;
        let log = String::from_utf8_lossy(&log)
            .trim_end_matches('\0')
            .to_owned();
        match code {
            SUCCESS => Ok(Outcome::Compiled {
                cubin: program.bytes("nvrtcGetCUBIN", table.cubin_size, table.cubin)?,
                ptx: program.bytes("nvrtcGetPTX", table.ptx_size, table.ptx)?,
                log,
            }),
            ERROR_COMPILATION => Ok(Outcome::Rejected { log }),
            code if log.trim().is_empty() => Err(Refusal {
                call: "nvrtcCompileProgram",
                message: table.describe(code),
            }),
            // Bad options and missing built-ins are explained in the log only.
            _ => Err(Refusal {
                call: "nvrtcCompileProgram",
                message: log.trim().to_owned(),
            }),
        }
    }
}

impl Table {
    fn describe(&self, code: Code) -> String {
        // SAFETY: takes any code and returns a static string ("... unknown" for new ones).
        let text = unsafe { (self.error_string)(code) };
        if text.is_null() {
            return format!("error {code}");
        }
        // SAFETY: not null, and NVRTC's strings are static and NUL-terminated.
        unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned()
    }

    fn accept(&self, call: &'static str, code: Code) -> Result<(), Refusal> {
        if code == SUCCESS {
            Ok(())
        } else {
            Err(Refusal {
                call,
                message: self.describe(code),
            })
        }
    }

    fn check(&self, call: &'static str, code: Code) -> Result<(), String> {
        self.accept(call, code)
            .map_err(|refusal| format!("{call}: {}", refusal.message))
    }
}

/// A program that is destroyed when it goes out of scope.
struct Live<'a> {
    table: &'a Table,
    program: Program,
}

impl Live<'_> {
    /// Reads one of NVRTC's "ask for the size, then for the bytes" results.
    fn bytes(
        &self,
        call: &'static str,
        size: unsafe extern "C" fn(Program, *mut usize) -> Code,
        read: unsafe extern "C" fn(Program, *mut c_char) -> Code,
    ) -> Result<Vec<u8>, Refusal> {
        let mut count = 0;
        // SAFETY: the program is alive and the pointer is valid for the call.
        self.table
            .accept(call, unsafe { size(self.program, &mut count) })?;
        let mut bytes = vec![0u8; count];
        // SAFETY: NVRTC writes exactly as many bytes as it has just said.
        self.table.accept(call, unsafe {
            read(self.program, bytes.as_mut_ptr().cast())
        })?;
        Ok(bytes)
    }
}

impl Drop for Live<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: created by this library and destroyed once. The code can only
            // say "invalid program", and there is nobody left to tell.
            unsafe { (self.table.destroy)(&mut self.program) };
        }
    }
}

/// Opens a library and never unloads it: NVRTC leaves thread-local state behind, and
/// entry points outlive any scope.
fn open_forever(path: &Path) -> Result<&'static Library, String> {
    // SAFETY: runs the library's initialisers. The library is one the user, or the
    // loader's path, named as NVRTC.
    let library = unsafe { Library::new(path) }.map_err(|error| whole(&error))?;
    Ok(Box::leak(Box::new(library)))
}

/// libloading's message names the call only; the loader's own words are its source.
fn whole(error: &libloading::Error) -> String {
    error.source().unwrap_or(error).to_string()
}

fn length(count: usize) -> c_int {
    c_int::try_from(count)
        .expect("fewer than 2^31 headers and options: each is a string in memory that we made")
}
