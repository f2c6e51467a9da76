//! Random numbers that are the same on every machine: xoshiro256++ \[blackman2021\].

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Random([u64; 4]);

impl Random {
    /// The stream of a seed (its state is drawn by SplitMix64, as the authors advise).
    pub fn new(seed: u64) -> Self {
        let mut x = seed;
        Self(std::array::from_fn(|_| {
            x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = x;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }))
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// A number below `bound`, all equally likely; 0 if `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 {
            return 0;
        }
        // Numbers from the last, incomplete round would favour small results.
        let limit = u64::MAX - u64::MAX % bound;
        loop {
            let x = self.next_u64();
            if x < limit {
                return x % bound;
            }
        }
    }

    /// `count` different numbers below `total`, every set equally likely (Floyd's algorithm), in no
    /// particular order.
    ///
    /// # Panics
    /// If `count > total`.
    pub fn sample(&mut self, total: usize, count: usize) -> Vec<usize> {
        assert!(count <= total);
        let mut chosen = Vec::with_capacity(count);
        for end in total - count..total {
            let candidate = self.below(end as u64 + 1) as usize;
            let taken = chosen.contains(&candidate);
            chosen.push(if taken { end } else { candidate });
        }
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_no_number_twice_and_every_number_equally_often() {
        let mut random = Random::new(3);
        let mut counts = [0_u32; 10];
        for _ in 0..10_000 {
            let mut sample = random.sample(10, 4);
            sample.sort_unstable();
            assert!(sample.windows(2).all(|w| w[0] < w[1]) && sample[3] < 10);
            for index in sample {
                counts[index] += 1;
            }
        }
        // 4000 expected each; the standard deviation is 49.
        assert!(
            counts.iter().all(|&c| (3700..4300).contains(&c)),
            "{counts:?}"
        );
        assert_eq!(random.sample(5, 5).len(), 5);
        assert_eq!(random.below(0), 0);
    }

    #[test]
    fn a_seed_gives_the_same_numbers_for_ever() {
        let mut random = Random::new(0);
        assert_eq!(random.next_u64(), 0x53175d61490b23df);
        assert_ne!(Random::new(1).next_u64(), Random::new(0).next_u64());
    }
}
