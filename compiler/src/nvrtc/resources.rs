//! Reads what `--ptxas-options=-v` says about each kernel.
//!
//! Owns ptxas' wording. It must not decide whether a number is good: that is the
//! caller's (our kernels must not spill).

use serde::{Deserialize, Serialize};

/// What one kernel uses, as ptxas reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelResources {
    /// The entry point's (lowered) name.
    pub name: String,
    /// Registers per thread.
    pub registers: u32,
    /// Bytes of register spill stores, per thread, summed over the kernel and the
    /// functions that were not inlined into it.
    pub spill_store_bytes: u32,
    /// Bytes of register spill loads, likewise.
    pub spill_load_bytes: u32,
    /// Local-memory stack per thread in bytes, callees included.
    pub stack_bytes: u32,
    /// Static shared memory per block in bytes (dynamic shared memory is the launch's).
    pub shared_bytes: u32,
}

/// Splits a log into the kernels' resources, in order of appearance, and the rest:
/// warnings, and remarks of ptxas that are no statistics.
pub(super) fn split(log: &str) -> (Vec<KernelResources>, String) {
    let mut kernels: Vec<KernelResources> = Vec::new();
    let mut rest = Vec::new();
    for line in log.lines() {
        let statistic = line.strip_prefix("ptxas").and_then(|after| {
            let after = after.trim_start();
            // "ptxas info    : Used ..." and its continuation "ptxas         .     0 bytes ..."
            after
                .strip_prefix("info")
                .map(|after| after.trim_start())
                .unwrap_or(after)
                .strip_prefix([':', '.'])
        });
        if !statistic.is_some_and(|text| read_statistic(text.trim(), &mut kernels)) {
            rest.push(line);
        }
    }
    (kernels, rest.join("\n").trim().to_owned())
}

/// Whether the text is a statistic; if so it is added to the kernel it is about.
fn read_statistic(text: &str, kernels: &mut Vec<KernelResources>) -> bool {
    if let Some(entry) = text.strip_prefix("Compiling entry function '") {
        let name = entry.split('\'').next().unwrap_or(entry).to_owned();
        kernels.push(KernelResources {
            name,
            ..Default::default()
        });
        return true;
    }
    let amount = |unit: &str| amount_of(text, unit);
    match kernels.last_mut() {
        Some(kernel) if text.contains("bytes stack frame") => {
            kernel.stack_bytes = kernel.stack_bytes.max(amount("bytes stack frame"));
            kernel.spill_store_bytes += amount("bytes spill stores");
            kernel.spill_load_bytes += amount("bytes spill loads");
            true
        }
        Some(kernel) if text.starts_with("Used ") => {
            kernel.registers = amount("registers");
            kernel.stack_bytes = kernel
                .stack_bytes
                .max(amount("bytes cumulative stack size"));
            kernel.shared_bytes = amount("bytes smem");
            true
        }
        _ => {
            text.contains("bytes gmem")
                || text.starts_with("Compile time = ")
                || text.starts_with("Function properties for ")
        }
    }
}

/// The number before `unit` in a list such as `Used 34 registers, 128 bytes smem`; 0
/// where the unit is not named, which is how ptxas says none.
fn amount_of(text: &str, unit: &str) -> u32 {
    text.split(',')
        .find_map(|item| {
            item.trim()
                .trim_start_matches("Used ")
                .strip_suffix(unit)?
                .trim()
                .parse()
                .ok()
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_split_from_warnings() {
        // NVRTC 13.0's own words, of two kernels, the second with a callee.
        let log = "\
kernel.cu(3): warning #177-D: variable \"x\" was declared but never referenced
  int x;
      ^

ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k2' for 'sm_90a'
ptxas info    : Function properties for k2
ptxas         .     400 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 34 registers, used 0 barriers, 400 bytes cumulative stack size
ptxas info    : Compile time = 9.732 ms
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 128 bytes smem, 360 bytes cmem[0]
ptxas info    : Function properties for callee
ptxas         .     16 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : (C7508) Potential Performance Loss: wgmma serialized
";
        let (kernels, rest) = split(log);
        let k2 = KernelResources {
            name: "k2".into(),
            registers: 34,
            spill_store_bytes: 8,
            spill_load_bytes: 12,
            stack_bytes: 400,
            shared_bytes: 0,
        };
        let k = KernelResources {
            name: "k".into(),
            registers: 10,
            spill_store_bytes: 4,
            spill_load_bytes: 4,
            stack_bytes: 16,
            shared_bytes: 128,
        };
        assert_eq!(kernels, [k2, k]);
        assert!(rest.starts_with("kernel.cu(3): warning"), "{rest}");
        assert!(
            rest.ends_with("ptxas info    : (C7508) Potential Performance Loss: wgmma serialized"),
            "{rest}"
        );
        assert_eq!(rest.lines().count(), 5, "{rest}");
    }
}
