#![no_main]

use mirage_untrusted::Target;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    Target::Prompts.run(input);
});
