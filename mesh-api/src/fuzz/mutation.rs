//! Bytes from bytes: what text, JSON and binary formats are damaged by. All that is drawn comes from a seed.

/// Longest result, bytes.
const BYTES_MAX: usize = 16 << 10;
/// What decoders trip over.
const TOKENS: [&[u8]; 27] = [
    b"",
    b"0",
    b"-1",
    b"1e999",
    b"0.1",
    b"255",
    b"65536",
    b"4294967296",
    b"9223372036854775808",
    b"18446744073709551615",
    b"18446744073709551616",
    b"null",
    b"true",
    b"\"\"",
    b"[]",
    b"{}",
    b"[[[[[[[[",
    b"{\"\":",
    b"\\u0000",
    b"\\ud800",
    b"\xff\xfe",
    b"\n",
    b"::/0",
    b"0.0.0.0/0",
    b"255.255.255.255/32",
    b"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128",
    b".",
];

/// A stream of numbers (SplitMix64).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// One of the numbers below `bound`; 0 if there is none.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.number()) * bound as u128) >> 64) as usize
    }
}

/// One of `from`, changed in one to four ways; nothing of nothing.
pub fn mutated(random: &mut Random, from: &[Vec<u8>]) -> Vec<u8> {
    let Some(start) = from.get(random.below(from.len())) else { return Vec::new() };
    let mut bytes = start.clone();
    for _ in 0..=random.below(4) {
        change(random, &mut bytes, from);
    }
    bytes.truncate(BYTES_MAX);
    bytes
}

fn change(random: &mut Random, bytes: &mut Vec<u8>, from: &[Vec<u8>]) {
    let at = random.below(bytes.len() + 1);
    let end = (at + random.below(64)).min(bytes.len());
    match random.below(9) {
        0 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        1 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = random.number() as u8;
            }
        }
        2 => drop(bytes.drain(at..end)),
        3 => {
            let again = bytes[at..end].to_vec();
            bytes.splice(at..at, again);
        }
        4 => {
            let noise: Vec<u8> = (0..random.below(16)).map(|_| random.number() as u8).collect();
            bytes.splice(at..at, noise);
        }
        5 => bytes.truncate(at),
        6 => {
            let token = TOKENS[random.below(TOKENS.len())];
            bytes.splice(at..at, token.iter().copied());
        }
        7 => {
            // In the place of a value: of what is between two marks.
            let is_mark = |byte: &u8| b",:[]{}\"=\n".contains(byte);
            let end = bytes[at..].iter().position(is_mark).map_or(bytes.len(), |len| at + len);
            let start = bytes[..at].iter().rposition(is_mark).map_or(0, |mark| mark + 1);
            let token = TOKENS[random.below(TOKENS.len())];
            bytes.splice(start..end, token.iter().copied());
        }
        _ => {
            let other = &from[random.below(from.len())];
            let rest = &other[random.below(other.len() + 1)..];
            bytes.truncate(at);
            bytes.extend_from_slice(rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_bytes_again_and_every_way_of_change_comes() {
        let from = [b"{\"a\":1,\"b\":[2,3]}".to_vec(), b"another".to_vec()];
        let draw = |seed| {
            let mut random = Random::new(seed);
            (0..5000).map(|_| mutated(&mut random, &from)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        let drawn = draw(3);
        assert!(
            drawn.iter().any(|bytes| bytes.len() > from[0].len() + 16) && drawn.iter().any(Vec::is_empty)
        );
        let null = b":null,";
        assert!(
            drawn.iter().any(|bytes| bytes.windows(null.len()).any(|part| part == null)),
            "a value is another"
        );
        assert!(mutated(&mut Random::new(1), &[]).is_empty());
    }
}
