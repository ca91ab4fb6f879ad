//! Changes of seeds, the same for the same number.

use mirage_testing::Random;

/// Numbers at which something ends: of types, of the project's limits, of what fits memory.
const NUMBERS: [&str; 16] = [
    "0",
    "1",
    "-1",
    "2",
    "15",
    "255",
    "65536",
    "16777216",
    "16777217",
    "4294967295",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "1e-6",
    "1e308",
    "-0.5",
];

/// What means something in one of the formats.
const WORDS: [&str; 24] = [
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "\"",
    "\\",
    ",",
    ":",
    "\n",
    "@",
    "#",
    "..",
    "/",
    "{layer}",
    "\u{feff}",
    "\\ud800",
    "\u{1f600}",
    "null",
    "true",
    "Linear(",
    "Some(",
    "r#\"",
];

/// Makes inputs of seeds.
pub struct Mutator {
    random: Random,
}

impl Mutator {
    /// The changes of this number.
    pub fn new(seed: u64) -> Mutator {
        Mutator {
            random: Random::new(seed),
        }
    }

    /// One of the seeds with one to eight changes.
    ///
    /// # Panics
    /// Without seeds.
    pub fn input(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let chosen = self.below(seeds.len());
        let mut input = seeds[chosen].clone();
        for _ in 0..=self.below(8) {
            self.change(&mut input, seeds);
        }
        input
    }

    fn change(&mut self, input: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        let at = self.below(input.len() + 1);
        let end = at + self.length(input.len() - at);
        match self.below(8) {
            0 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << self.below(8);
                }
            }
            1 => drop(input.drain(at..end)),
            2 => {
                let copy = input[at..end].to_vec();
                let to = self.below(input.len() + 1);
                input.splice(to..to, copy);
            }
            3 => {
                let word = WORDS[self.below(WORDS.len())];
                input.splice(at..at, word.bytes());
            }
            4 | 5 => self.number(input, at),
            6 => {
                let other = &seeds[self.below(seeds.len())];
                let from = self.below(other.len() + 1);
                let to = from + self.length(other.len() - from);
                input.splice(at..end, other[from..to].iter().copied());
            }
            _ => {
                let byte = self.random.bits() as u8;
                input.insert(at, byte);
            }
        }
    }

    /// Puts another number in the place of the first one behind `at`.
    fn number(&mut self, input: &mut Vec<u8>, at: usize) {
        let is_digit = |byte: &u8| byte.is_ascii_digit();
        let Some(start) = input[at..].iter().position(is_digit).map(|i| at + i) else {
            return;
        };
        let length = input[start..]
            .iter()
            .take_while(|byte| is_digit(byte))
            .count();
        let number = NUMBERS[self.below(NUMBERS.len())];
        input.splice(start..start + length, number.bytes());
    }

    /// A length up to `most`, mostly short.
    fn length(&mut self, most: usize) -> usize {
        let range = if self.below(4) == 0 {
            most
        } else {
            most.min(16)
        };
        self.below(range + 1)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.random.bits() % end as u64) as usize
    }
}
