//! Histograms that grow over batches without losing a count, and merge in any order.
//!
//! **One batch** is counted on `bins` equal bins over its exact finite range: the edges and counts of
//! `torch.histc`. **Several batches** meet on a common lattice: bins of width `2^level` at the
//! multiples of `2^level`, with the smallest `level` at which the whole observed range takes at most
//! `2 * bins` of them. Each batch's counts are laid onto the lattice once, by a rule that looks at
//! nothing but that batch; a larger range later only adds neighbouring bins in pairs. So the state
//! is a sum over batches: it does not depend on their order, nor on which process saw which. Bins of
//! the lattice are at most as wide as those of `bins` equal bins over the observed range.

use super::walk::{GroupWalk, Scratch};
use super::{min_max::no_data, simd, Values};
use crate::encoding::BlockGeometry;
use crate::error::{Error, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Most bins a histogram may have.
pub const MAX_BINS: u32 = 1 << 20;

/// Elements one thread counts at a time when a group is shared between threads.
const PIECE: usize = 1 << 16;

/// Tables the increments are spread over: repeated values would wait for each other in one.
const TABLES: usize = 4;

/// Where the bins of a histogram lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Bins {
    /// Equal bins over `low..=high`, `HistogramStatistics::bins()` of them.
    Equal { low: f32, high: f32 },
    /// Bin `i` is `i * 2^level .. (i + 1) * 2^level`.
    Lattice { level: i32 },
}

/// What was seen of one group: the finite range and the counts of the bins that are not empty.
///
/// Infinities are counted at the ends of their batch's range, NaN not at all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupHistogram {
    min: f32,
    max: f32,
    /// Values beyond were counted as if they were these.
    limits: (f32, f32),
    bins: Bins,
    /// Numbers of the bins with a count, ascending.
    index: Vec<i32>,
    count: Vec<u64>,
}

impl GroupHistogram {
    /// Smallest finite value.
    pub fn min(&self) -> f32 {
        self.min
    }

    /// Largest finite value.
    pub fn max(&self) -> f32 {
        self.max
    }

    /// Where the bins lie.
    pub fn bins(&self) -> Bins {
        self.bins
    }

    /// Numbers (ascending) and counts of the bins that are not empty.
    pub fn counts(&self) -> (&[i32], &[u64]) {
        (&self.index, &self.count)
    }

    /// Number of values counted.
    pub fn total(&self) -> u64 {
        self.count.iter().sum()
    }

    /// Left edge of bin `i`.
    pub fn edge(&self, i: i32, bins: u32) -> f32 {
        match self.bins {
            Bins::Equal { low, high } => {
                let step = (high - low) / bins as f32;
                i as f32 * step + low
            }
            Bins::Lattice { level } => (f64::from(i) * exp2(level)) as f32,
        }
    }

    /// Appends the middles of the bins that are not empty. With `as_reference`, those of equal bins
    /// are derived from the first two edges in float32, as AIMET does, which drifts by up to
    /// `bins * 2^-24` of the lower end towards the upper one.
    pub(super) fn mids(&self, bins: u32, as_reference: bool, out: &mut Vec<f32>) {
        match self.bins {
            Bins::Equal { low, .. } if as_reference => {
                let width = self.edge(1, bins) - low;
                let first = low + width / 2.0;
                out.extend(self.index.iter().map(|&i| first + width * i as f32));
            }
            Bins::Equal { low, high } => {
                let (low, span) = (f64::from(low), f64::from(high) - f64::from(low));
                let middle = |i: i32| low + span * ((f64::from(i) + 0.5) / f64::from(bins));
                out.extend(self.index.iter().map(|&i| middle(i) as f32));
            }
            Bins::Lattice { level } => {
                let width = exp2(level);
                out.extend(
                    self.index
                        .iter()
                        .map(|&i| ((f64::from(i) + 0.5) * width) as f32),
                );
            }
        }
    }

    /// The same counts on the lattice. Depends on this histogram alone.
    fn to_lattice(&self, bins: u32) -> Self {
        let Bins::Equal { low, high } = self.bins else {
            return self.clone();
        };
        let level = level_for(self.min, self.max, 2 * bins);
        let width = exp2(level);
        let bin_of = |x: f64| (x / width).floor() as i32;
        let first = bin_of(f64::from(self.min));
        let last = bin_of(f64::from(self.max));
        let mut index: Vec<i32> = Vec::with_capacity(self.index.len() + 8);
        let mut count: Vec<u64> = Vec::with_capacity(self.index.len() + 8);
        let mut add = |bin: i32, n: u64| {
            if n == 0 {
            } else if index.last() == Some(&bin) {
                *count.last_mut().expect("as long as index") += n;
            } else {
                index.push(bin);
                count.push(n);
            }
        };
        if self.min == self.max {
            add(first, self.total());
        } else {
            let (low, span) = (f64::from(low), f64::from(high) - f64::from(low));
            let edge = |i: i32| low + span * (f64::from(i) / f64::from(bins));
            for (&i, &n) in self.index.iter().zip(&self.count) {
                // The values of a bin are taken as spread evenly over it; each lattice bin gets the
                // rounded share up to its right end, less what those before it got.
                let (left, right) = (edge(i), edge(i + 1));
                let from = bin_of(left).clamp(first, last);
                let to = bin_of(right).clamp(first, last);
                let mut given = 0;
                for bin in from..to {
                    let share = (f64::from(bin + 1) * width - left) / (right - left);
                    let upto = (n as f64 * share).round() as u64;
                    let upto = upto.clamp(given, n);
                    add(bin, upto - given);
                    given = upto;
                }
                add(to, n - given);
            }
        }
        Self {
            min: self.min,
            max: self.max,
            limits: self.limits,
            bins: Bins::Lattice { level },
            index,
            count,
        }
    }

    /// Takes in the counts of other data.
    fn merge(&mut self, other: &Self, bins: u32) {
        let a = self.to_lattice(bins);
        let b = other.to_lattice(bins);
        let (Bins::Lattice { level: level_a }, Bins::Lattice { level: level_b }) = (a.bins, b.bins)
        else {
            unreachable!("both were laid onto the lattice");
        };
        self.min = a.min.min(b.min);
        self.max = a.max.max(b.max);
        self.limits = (a.limits.0.min(b.limits.0), a.limits.1.max(b.limits.1));
        let level = level_for(self.min, self.max, 2 * bins);
        let coarser = |histogram: &Self, from: i32| -> Vec<(i32, u64)> {
            let shift = (level - from).clamp(0, 31);
            histogram
                .index
                .iter()
                .map(|i| i >> shift)
                .zip(histogram.count.iter().copied())
                .collect()
        };
        let (a, b) = (coarser(&a, level_a), coarser(&b, level_b));
        self.bins = Bins::Lattice { level };
        self.index.clear();
        self.count.clear();
        let (mut a, mut b) = (a.into_iter().peekable(), b.into_iter().peekable());
        loop {
            let next = match (a.peek(), b.peek()) {
                (Some(x), Some(y)) if x.0 <= y.0 => a.next(),
                (Some(_), None) => a.next(),
                (_, Some(_)) => b.next(),
                (None, None) => break,
            };
            let Some((bin, n)) = next else { break };
            if self.index.last() == Some(&bin) {
                *self.count.last_mut().expect("as long as index") += n;
            } else {
                self.index.push(bin);
                self.count.push(n);
            }
        }
    }

    fn is_valid(&self, bins: u32) -> bool {
        if !(self.min.is_finite() && self.max.is_finite() && self.min <= self.max) {
            return false;
        }
        let in_range = match self.bins {
            Bins::Equal { low, high } => {
                low.is_finite()
                    && high.is_finite()
                    && low <= self.min
                    && self.max <= high
                    && self.index.iter().all(|&i| i >= 0 && (i as u32) < bins)
            }
            Bins::Lattice { level } => {
                level == level_for(self.min, self.max, 2 * bins) && {
                    let width = exp2(level);
                    let bin_of = |x: f32| (f64::from(x) / width).floor() as i32;
                    let span = bin_of(self.min)..=bin_of(self.max);
                    self.index.iter().all(|i| span.contains(i))
                }
            }
        };
        in_range
            && self.limits.0 <= self.min
            && self.max <= self.limits.1
            && !self.index.is_empty()
            && self.index.len() == self.count.len()
            && self.index.is_sorted_by(|a, b| a < b)
            && !self.count.contains(&0)
    }
}

/// `2^level`, exactly, for every level that float32 ranges lead to.
fn exp2(level: i32) -> f64 {
    f64::from_bits(((level + 1023) as u64) << 52)
}

/// The smallest level at which `min..=max` takes at most `most` bins of the lattice. Not below what
/// float32 resolves at the larger end, so that bin numbers fit 26 bits.
fn level_for(min: f32, max: f32, most: u32) -> i32 {
    let largest = min.abs().max(max.abs());
    let exponent = ((f64::from(largest).to_bits() >> 52) & 0x7ff) as i32 - 1023;
    let finest = (exponent - 24).max(-149);
    let (min, max) = (f64::from(min), f64::from(max));
    // A range r takes at least r / width bins.
    let guess = (((max - min) / f64::from(most)).to_bits() >> 52) as i32 - 1023;
    let mut level = guess.max(finest);
    loop {
        let width = exp2(level);
        let taken = (max / width).floor() - (min / width).floor() + 1.0;
        if taken <= f64::from(most) {
            return level;
        }
        level += 1;
    }
}

/// The running histograms of all groups of a tensor.
///
/// ```
/// use rimet::calibration::{HistogramStatistics, Values};
/// use rimet::encoding::BlockGeometry;
/// let geometry = BlockGeometry::new(&[4], &[1], &[1], None).unwrap();
/// let mut statistics = HistogramStatistics::new(4, None).unwrap();
/// statistics.update(Values::F32(&[0.0, 1.0, 2.0, 4.0]), &geometry).unwrap();
/// assert_eq!(statistics.groups()[0].counts(), (&[0, 1, 2, 3][..], &[1, 1, 1, 1][..]));
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HistogramStatistics {
    bins: u32,
    growth_limit: Option<f32>,
    groups: Vec<GroupHistogram>,
}

impl HistogramStatistics {
    /// No data yet.
    ///
    /// - `bins`: number of bins over the range of a batch, `1..=2^20`.
    /// - `growth_limit`: how far later batches may widen the range, in multiples of the first
    ///   batch's range (half to each side); what lies beyond is counted at the limit. `None`: any.
    ///
    /// # Errors
    /// [`Error::Value`] for no or too many bins, a limit below 1.
    pub fn new(bins: usize, growth_limit: Option<f64>) -> Result<Self> {
        let bins = u32::try_from(bins).unwrap_or(u32::MAX);
        if !(1..=MAX_BINS).contains(&bins) {
            return Err(Error::value("num_bins", format!("1 to {MAX_BINS}"), bins));
        }
        if let Some(limit) = growth_limit {
            if limit.is_nan() || limit < 1.0 {
                return Err(Error::value(
                    "histogram_growth_limit",
                    "at least 1.0",
                    limit,
                ));
            }
        }
        let growth_limit = growth_limit.filter(|l| l.is_finite()).map(|l| l as f32);
        Ok(Self {
            bins,
            growth_limit,
            groups: Vec::new(),
        })
    }

    /// Number of bins over the range of a batch.
    pub fn bins(&self) -> u32 {
        self.bins
    }

    /// One histogram per group; empty before any data.
    pub fn groups(&self) -> &[GroupHistogram] {
        &self.groups
    }

    /// [`Self::groups`], or an error before any data.
    pub(super) fn observed(&self) -> Result<&[GroupHistogram]> {
        if self.groups.is_empty() {
            return Err(no_data());
        }
        Ok(&self.groups)
    }

    /// Forgets all data.
    pub fn reset(&mut self) {
        self.groups.clear();
    }

    /// Counts a tensor, and takes the counts in.
    ///
    /// # Errors
    /// [`Error::Value`] if the tensor is empty, does not fit the geometry or the data seen so far,
    /// or a group has no finite value; the statistics are then as before.
    pub fn update(&mut self, values: Values<'_>, geometry: &BlockGeometry) -> Result<()> {
        let batch = self.collect(values, geometry, true)?;
        self.merge(batch)
    }

    /// The statistics of a tensor alone, with this one's number of bins and, if `limited`, within the
    /// limits that the data seen so far have set.
    ///
    /// # Errors
    /// As [`Self::update`].
    pub fn collect(
        &self,
        values: Values<'_>,
        geometry: &BlockGeometry,
        limited: bool,
    ) -> Result<Self> {
        values.check(geometry)?;
        let walk = GroupWalk::new(geometry);
        let limits = if limited && !self.groups.is_empty() {
            self.check_groups(walk.groups())?;
            Some(self.groups.as_slice())
        } else {
            None
        };
        let limit_of = |group: usize| limits.map(|groups| groups[group].limits);
        let counter = Counter {
            walk: &walk,
            values,
            bins: self.bins,
            growth: self.growth_limit,
        };
        let tiles = walk.tiles();
        let threads = rayon::current_num_threads();
        let groups: Vec<Vec<GroupHistogram>> =
            if tiles.len() >= 4 * threads || values.len() <= PIECE {
                tiles
                    .into_par_iter()
                    .map_init(Workspace::default, |workspace, tile| {
                        counter.count(tile, &limit_of, workspace)
                    })
                    .collect::<Result<_>>()?
            } else {
                tiles
                    .into_iter()
                    .map(|tile| counter.count_shared(tile, &limit_of))
                    .collect::<Result<_>>()?
            };
        Ok(Self {
            bins: self.bins,
            growth_limit: self.growth_limit,
            groups: groups.into_iter().flatten().collect(),
        })
    }

    /// Takes in statistics of other data. The order of merging does not matter, nor the grouping:
    /// the result is the same to the last count.
    ///
    /// Limits of growth that differ are joined to the wider ones.
    ///
    /// # Errors
    /// [`Error::Value`] if the number of bins or of groups differs.
    pub fn merge(&mut self, other: Self) -> Result<()> {
        if other.bins != self.bins {
            return Err(Error::value(
                "other",
                format!("histograms of {} bins", self.bins),
                other.bins,
            ));
        }
        if other.groups.is_empty() {
            return Ok(());
        }
        if self.groups.is_empty() {
            self.groups = other.groups;
            return Ok(());
        }
        self.check_groups(other.groups.len())?;
        let bins = self.bins;
        self.groups
            .par_iter_mut()
            .zip(&other.groups)
            .with_min_len(8)
            .for_each(|(into, from)| into.merge(from, bins));
        Ok(())
    }

    fn check_groups(&self, groups: usize) -> Result<()> {
        if groups == self.groups.len() {
            return Ok(());
        }
        Err(Error::value(
            "input",
            format!("{} encodings, as before", self.groups.len()),
            groups,
        ))
    }

    /// Statistics of one batch counted elsewhere (on a GPU): for each group the finite range and the
    /// dense counts over the bins that [`Self::batch_range`] gives for it.
    ///
    /// # Errors
    /// [`Error::Value`] if the sizes do not fit, or a range is not finite.
    pub fn from_counts(&self, ranges: &[(f32, f32)], counts: &[i64]) -> Result<Self> {
        let bins = self.bins as usize;
        if counts.len() != ranges.len() * bins {
            return Err(Error::value("counts", ranges.len() * bins, counts.len()));
        }
        let known = (!self.groups.is_empty()).then_some(&self.groups);
        if known.is_some() {
            self.check_groups(ranges.len())?;
        }
        let groups = ranges
            .iter()
            .zip(counts.chunks(bins))
            .enumerate()
            .map(|(group, (&range, counts))| {
                let limits = known.map(|groups| groups[group].limits);
                let frame = Frame::new(range, limits, self.growth_limit, group)?;
                let entries = counts.iter().enumerate().filter(|&(_, &n)| n > 0);
                let (index, count): (Vec<i32>, Vec<u64>) =
                    entries.map(|(i, &n)| (i as i32, n as u64)).unzip();
                if index.is_empty() {
                    return Err(Error::value("counts", "a count in every group", "none"));
                }
                Ok(frame.into_group(index, count))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            bins: self.bins,
            growth_limit: self.growth_limit,
            groups,
        })
    }

    /// The bins a batch with finite ranges `ranges` is counted on, `(low, high)` per group, within
    /// the limits the data seen so far have set.
    ///
    /// # Errors
    /// [`Error::Value`] if the number of groups differs, or a range is not finite.
    pub fn batch_range(&self, ranges: &[(f32, f32)]) -> Result<Vec<(f32, f32)>> {
        if !self.groups.is_empty() {
            self.check_groups(ranges.len())?;
        }
        ranges
            .iter()
            .enumerate()
            .map(|(group, &range)| {
                let limits = self.groups.get(group).map(|g| g.limits);
                let frame = Frame::new(range, limits, self.growth_limit, group)?;
                Ok((frame.low, frame.high))
            })
            .collect()
    }

    /// Everything as flat arrays, for files and messages; [`Self::from_parts`] reads them.
    pub fn to_parts(&self) -> Parts {
        let mut parts = Parts {
            start: vec![0],
            ..Parts::default()
        };
        for g in &self.groups {
            let (low, high, level) = match g.bins {
                Bins::Equal { low, high } => (low, high, Parts::EQUAL),
                Bins::Lattice { level } => (0.0, 0.0, level),
            };
            parts
                .range
                .extend([g.min, g.max, g.limits.0, g.limits.1, low, high]);
            parts.level.push(level);
            parts.index.extend(&g.index);
            parts.count.extend(g.count.iter().map(|&n| n as i64));
            parts.start.push(parts.index.len() as i64);
        }
        parts
    }

    /// Replaces all data by what [`Self::to_parts`] has written.
    ///
    /// # Errors
    /// [`Error::Value`] if the arrays cannot be histograms with this number of bins; the statistics
    /// are then as before.
    pub fn set_parts(&mut self, parts: &Parts) -> Result<()> {
        let broken = |what: &str| Error::value("parts", "histograms that `to_parts` wrote", what);
        let groups = parts.level.len();
        if parts.range.len() != 6 * groups || parts.start.len() != groups + 1 {
            return Err(broken("arrays whose lengths do not fit together"));
        }
        let total = i64::try_from(parts.index.len()).unwrap_or(i64::MAX);
        if parts.start[0] != 0
            || parts.start[groups] != total
            || !parts.start.is_sorted()
            || parts.count.len() != parts.index.len()
        {
            return Err(broken("arrays whose lengths do not fit together"));
        }
        let groups: Vec<GroupHistogram> = (0..groups)
            .map(|g| {
                let range = &parts.range[6 * g..6 * g + 6];
                let entries = parts.start[g] as usize..parts.start[g + 1] as usize;
                GroupHistogram {
                    min: range[0],
                    max: range[1],
                    limits: (range[2], range[3]),
                    bins: match parts.level[g] {
                        Parts::EQUAL => Bins::Equal {
                            low: range[4],
                            high: range[5],
                        },
                        level => Bins::Lattice { level },
                    },
                    index: parts.index[entries.clone()].to_vec(),
                    // A negative count becomes zero, which is refused below.
                    count: parts.count[entries]
                        .iter()
                        .map(|&n| n.max(0) as u64)
                        .collect(),
                }
            })
            .collect();
        if let Some(bad) = groups.iter().position(|g| !g.is_valid(self.bins)) {
            return Err(broken(&format!("a broken histogram of encoding {bad}")));
        }
        self.groups = groups;
        Ok(())
    }
}

/// [`HistogramStatistics`] as flat arrays.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Parts {
    /// Per group: min, max, lower and upper limit, low and high end of equal bins.
    pub range: Vec<f32>,
    /// Per group: the lattice's level, or [`Parts::EQUAL`].
    pub level: Vec<i32>,
    /// Where each group's entries begin in `index` and `count`, and the end.
    pub start: Vec<i64>,
    /// Bin numbers.
    pub index: Vec<i32>,
    /// Counts.
    pub count: Vec<i64>,
}

impl Parts {
    /// Stands for equal bins in `level`.
    pub const EQUAL: i32 = i32::MIN;
}

/// The bins of one batch of a group, and what to remember of it.
#[derive(Clone, Copy, Debug)]
struct Frame {
    min: f32,
    max: f32,
    low: f32,
    high: f32,
    limits: (f32, f32),
}

impl Frame {
    /// The frame of a batch with finite range `range`, clipped to `limits`; without limits (the first
    /// batch) it sets its own from the allowed growth.
    fn new(
        range: (f32, f32),
        limits: Option<(f32, f32)>,
        growth: Option<f32>,
        group: usize,
    ) -> Result<Self> {
        let (min, max) = range;
        if !(min.is_finite() && max.is_finite() && min <= max) {
            return Err(Error::value(
                "input",
                "at least one finite value for every encoding",
                format!("none for encoding {group}"),
            ));
        }
        let (min, max) = match limits {
            Some((low, high)) => (min.clamp(low, high), max.clamp(low, high)),
            None => (min, max),
        };
        // A single value stands in the middle of a range of 1, as in the reference.
        let (low, high) = if min == max {
            ((min - 0.5).max(f32::MIN), (max + 0.5).min(f32::MAX))
        } else {
            (min, max)
        };
        let limits = limits.unwrap_or_else(|| match growth {
            None => (f32::NEG_INFINITY, f32::INFINITY),
            Some(growth) => {
                let room = (high - low) * growth / 2.0;
                (low - room, high + room)
            }
        });
        Ok(Self {
            min,
            max,
            low,
            high,
            limits,
        })
    }

    fn into_group(self, index: Vec<i32>, count: Vec<u64>) -> GroupHistogram {
        GroupHistogram {
            min: self.min,
            max: self.max,
            limits: self.limits,
            bins: Bins::Equal {
                low: self.low,
                high: self.high,
            },
            index,
            count,
        }
    }
}

/// Buffers each thread keeps.
#[derive(Default)]
struct Workspace {
    scratch: Scratch,
    table: Vec<u32>,
    bins: Vec<u32>,
}

/// Counts the groups of one tensor.
struct Counter<'a> {
    walk: &'a GroupWalk,
    values: Values<'a>,
    bins: u32,
    growth: Option<f32>,
}

impl Counter<'_> {
    /// Finite ranges of a tile's groups over `elements`.
    fn ranges(
        &self,
        tile: &Range<usize>,
        elements: Range<usize>,
        scratch: &mut Scratch,
    ) -> Vec<(f32, f32)> {
        let mut ranges = vec![(f32::INFINITY, f32::NEG_INFINITY); tile.len()];
        self.walk.for_each_slice(
            self.values,
            tile.clone(),
            elements,
            scratch,
            |group, slice| {
                let mut seen = simd::range(slice);
                if seen.0 == f32::NEG_INFINITY || seen.1 == f32::INFINITY {
                    // Infinities, or nothing but NaN: look again for the finite ones.
                    let finite = slice.iter().copied().filter(|x| x.is_finite());
                    seen = finite.fold((f32::INFINITY, f32::NEG_INFINITY), |r, x| {
                        (r.0.min(x), r.1.max(x))
                    });
                }
                widen(&mut ranges[group - tile.start], seen);
            },
        );
        ranges
    }

    /// Adds the counts of `elements` to the tables: `TABLES` of `bins + 1` for each group.
    fn add(
        &self,
        tile: &Range<usize>,
        elements: Range<usize>,
        frames: &[Frame],
        workspace: &mut Workspace,
    ) {
        let width = self.bins as usize + 1;
        let Workspace {
            scratch,
            table,
            bins,
        } = workspace;
        table.clear();
        table.resize(tile.len() * TABLES * width, 0);
        bins.resize(super::walk::CHUNK, 0);
        self.walk.for_each_slice(
            self.values,
            tile.clone(),
            elements,
            scratch,
            |group, slice| {
                let frame = &frames[group - tile.start];
                let bins = &mut bins[..slice.len()];
                frame_bins(frame, slice, self.bins, bins);
                let tables = &mut table[(group - tile.start) * TABLES * width..][..TABLES * width];
                increment(tables, width, bins);
            },
        );
    }

    /// The entries of a tile's groups, from tables that [`Self::add`] has filled.
    fn entries(&self, table: &[u32], group: usize, dense: &mut [u64]) {
        let width = self.bins as usize + 1;
        let tables = &table[group * TABLES * width..][..TABLES * width];
        for (i, n) in dense.iter_mut().enumerate() {
            *n += (0..TABLES)
                .map(|t| u64::from(tables[t * width + i]))
                .sum::<u64>();
        }
    }

    fn frames(
        &self,
        tile: &Range<usize>,
        ranges: &[(f32, f32)],
        limit_of: &impl Fn(usize) -> Option<(f32, f32)>,
    ) -> Result<Vec<Frame>> {
        tile.clone()
            .zip(ranges)
            .map(|(group, &range)| Frame::new(range, limit_of(group), self.growth, group))
            .collect()
    }

    /// Counts a tile in this thread.
    fn count(
        &self,
        tile: Range<usize>,
        limit_of: &impl Fn(usize) -> Option<(f32, f32)>,
        workspace: &mut Workspace,
    ) -> Result<Vec<GroupHistogram>> {
        let all = 0..self.walk.per_group();
        let ranges = self.ranges(&tile, all.clone(), &mut workspace.scratch);
        let frames = self.frames(&tile, &ranges, limit_of)?;
        if tile.len() == 1 && self.walk.per_group() < self.bins as usize / 4 {
            return Ok(vec![self.count_few(&tile, frames[0], workspace)]);
        }
        // Tables hold 32-bit counts.
        if self.walk.per_group() <= u32::MAX as usize {
            let mut dense = vec![0_u64; self.bins as usize];
            self.add(&tile, all, &frames, workspace);
            return Ok(frames
                .into_iter()
                .enumerate()
                .map(|(i, frame)| {
                    dense.fill(0);
                    self.entries(&workspace.table, i, &mut dense);
                    sparse(frame, &dense)
                })
                .collect());
        }
        self.count_shared(tile, limit_of)
    }

    /// Counts a group of fewer elements than bins: sorts the bin numbers.
    fn count_few(
        &self,
        tile: &Range<usize>,
        frame: Frame,
        workspace: &mut Workspace,
    ) -> GroupHistogram {
        let Workspace {
            scratch,
            bins,
            table,
        } = workspace;
        table.clear();
        bins.resize(super::walk::CHUNK, 0);
        let all = 0..self.walk.per_group();
        self.walk
            .for_each_slice(self.values, tile.clone(), all, scratch, |_, slice| {
                let bins = &mut bins[..slice.len()];
                frame_bins(&frame, slice, self.bins, bins);
                table.extend(bins.iter().filter(|&&bin| bin < self.bins));
            });
        table.sort_unstable();
        let runs = || table.chunk_by(|a, b| a == b);
        frame.into_group(
            runs().map(|run| run[0] as i32).collect(),
            runs().map(|run| run.len() as u64).collect(),
        )
    }

    /// Counts a tile with all threads.
    fn count_shared(
        &self,
        tile: Range<usize>,
        limit_of: &impl Fn(usize) -> Option<(f32, f32)>,
    ) -> Result<Vec<GroupHistogram>> {
        let per_group = self.walk.per_group();
        let threads = rayon::current_num_threads();
        // Few enough pieces that zeroing and adding up their tables does not count.
        let length = per_group.div_ceil(8 * threads).clamp(PIECE, 1 << 31);
        let pieces: Vec<Range<usize>> = (0..per_group)
            .step_by(length)
            .map(|start| start..(start + length).min(per_group))
            .collect();
        let ranges = pieces
            .par_iter()
            .map_init(Scratch::default, |scratch, piece| {
                self.ranges(&tile, piece.clone(), scratch)
            })
            .reduce_with(|mut a, b| {
                a.iter_mut().zip(b).for_each(|(a, b)| widen(a, b));
                a
            })
            .unwrap_or_default();
        let frames = self.frames(&tile, &ranges, limit_of)?;
        let bins = self.bins as usize;
        let dense = pieces
            .par_iter()
            .fold(
                || (Workspace::default(), vec![0_u64; tile.len() * bins]),
                |(mut workspace, mut dense), piece| {
                    self.add(&tile, piece.clone(), &frames, &mut workspace);
                    for (i, dense) in dense.chunks_mut(bins).enumerate() {
                        self.entries(&workspace.table, i, dense);
                    }
                    (workspace, dense)
                },
            )
            .map(|(_, dense)| dense)
            .reduce_with(|mut a, b| {
                a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
                a
            })
            .unwrap_or_default();
        Ok(frames
            .into_iter()
            .zip(dense.chunks(bins))
            .map(|(f, dense)| sparse(f, dense))
            .collect())
    }
}

fn widen(range: &mut (f32, f32), by: (f32, f32)) {
    range.0 = range.0.min(by.0);
    range.1 = range.1.max(by.1);
}

fn sparse(frame: Frame, dense: &[u64]) -> GroupHistogram {
    let filled = dense.iter().filter(|&&n| n > 0).count();
    let mut index = Vec::with_capacity(filled);
    let mut count = Vec::with_capacity(filled);
    for (i, &n) in dense.iter().enumerate() {
        if n > 0 {
            index.push(i as i32);
            count.push(n);
        }
    }
    frame.into_group(index, count)
}

/// Bin of each value in its frame; NaN goes to the extra bin `bins`.
fn frame_bins(frame: &Frame, x: &[f32], bins: u32, out: &mut [u32]) {
    let span = frame.high - frame.low;
    if frame.min == frame.max {
        // One value: the middle bin, by the same formula; infinities to the ends.
        for (slot, &v) in out.iter_mut().zip(x) {
            *slot = match v {
                v if v.is_nan() => bins,
                f32::NEG_INFINITY => 0,
                f32::INFINITY => bins - 1,
                _ => bins / 2,
            };
        }
    } else if (span * bins as f32).is_finite() {
        simd::bin_indices(x, frame.low, frame.high, bins, out);
    } else {
        // The formula in float64, where float32 would overflow.
        let (low, span) = (
            f64::from(frame.low),
            f64::from(frame.high) - f64::from(frame.low),
        );
        for (slot, &v) in out.iter_mut().zip(x) {
            let t = (f64::from(v) - low) / span * f64::from(bins);
            *slot = if t.is_nan() {
                bins
            } else {
                t.clamp(0.0, f64::from(bins - 1)) as u32
            };
        }
    }
}

/// Adds one to the counters of the given bins, in tables that together hold the counts.
fn increment(tables: &mut [u32], width: usize, bins: &[u32]) {
    let [a, b, c, d] = split(tables, width);
    let (fours, rest) = bins.as_chunks::<4>();
    for four in fours {
        a[four[0] as usize] += 1;
        b[four[1] as usize] += 1;
        c[four[2] as usize] += 1;
        d[four[3] as usize] += 1;
    }
    for &bin in rest {
        a[bin as usize] += 1;
    }
}

fn split(tables: &mut [u32], width: usize) -> [&mut [u32]; TABLES] {
    let (a, rest) = tables.split_at_mut(width);
    let (b, rest) = rest.split_at_mut(width);
    let (c, d) = rest.split_at_mut(width);
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn per_tensor(n: usize) -> BlockGeometry {
        BlockGeometry::new(&[n as i64], &[1], &[1], None).unwrap()
    }

    fn of(x: &[f32], bins: usize) -> HistogramStatistics {
        let mut statistics = HistogramStatistics::new(bins, None).unwrap();
        statistics
            .update(Values::F32(x), &per_tensor(x.len()))
            .unwrap();
        statistics
    }

    #[test]
    fn levels() {
        // 0..=1 on at most 4 bins: width 1/4 takes 0, .25, .5, .75 and the one that begins at 1.
        assert_eq!(level_for(0.0, 1.0, 4), -1);
        assert_eq!(level_for(0.0, 0.99, 4), -2);
        assert_eq!(level_for(0.0, 0.0, 4), -149);
        assert_eq!(level_for(1.0, 1.0, 4), -24);
        assert_eq!(level_for(f32::MIN, f32::MAX, 2), 128);
    }

    #[test]
    fn special_values_are_counted_or_refused() {
        let x = [f32::NAN, 1.0, f32::INFINITY, -1.0, f32::NEG_INFINITY, 0.0];
        let s = of(&x, 4);
        let g = &s.groups()[0];
        assert_eq!((g.min(), g.max(), g.total()), (-1.0, 1.0, 5));
        assert_eq!(g.counts(), (&[0, 2, 3][..], &[2, 1, 2][..]));

        let constant = of(&[3.0; 7], 4);
        let g = &constant.groups()[0];
        assert_eq!(
            (g.min(), g.max(), g.bins()),
            (
                3.0,
                3.0,
                Bins::Equal {
                    low: 2.5,
                    high: 3.5
                }
            )
        );
        assert_eq!(g.counts(), (&[2][..], &[7][..]));

        let mut s = HistogramStatistics::new(4, None).unwrap();
        let e = s
            .update(Values::F32(&[f32::NAN; 3]), &per_tensor(3))
            .unwrap_err();
        assert!(e.to_string().contains("encoding 0"), "{e}");
        assert!(s.groups().is_empty());
        assert!(s.update(Values::F32(&[]), &per_tensor(0)).is_err());
        assert!(HistogramStatistics::new(0, None).is_err());
        assert!(HistogramStatistics::new(4, Some(0.5)).is_err());
        assert!(HistogramStatistics::new(4, Some(f64::NAN)).is_err());

        // The widest range there is: nothing is lost.
        let s = of(&[f32::MIN, f32::MAX, 0.0], 4);
        assert_eq!(s.groups()[0].counts(), (&[0, 2, 3][..], &[1, 1, 1][..]));
    }

    #[test]
    fn growth_is_limited() {
        let mut s = HistogramStatistics::new(8, Some(3.0)).unwrap();
        s.update(Values::F32(&[-1.0, 1.0]), &per_tensor(2)).unwrap();
        s.update(Values::F32(&[-100.0, 0.0, 3.5]), &per_tensor(3))
            .unwrap();
        let g = &s.groups()[0];
        assert_eq!((g.min(), g.max(), g.total()), (-4.0, 3.5, 5));
        // A batch that lies beyond altogether is counted at the limit.
        s.update(Values::F32(&[50.0, 60.0]), &per_tensor(2))
            .unwrap();
        let g = &s.groups()[0];
        assert_eq!((g.min(), g.max(), g.total()), (-4.0, 4.0, 7));
    }

    #[test]
    fn a_tensor_shared_between_threads_counts_the_same() {
        let n = 5 * PIECE + 17;
        let x: Vec<f32> = (0..n)
            .map(|i| ((i * 7919) % 10007) as f32 * 0.37 - 900.0)
            .collect();
        let whole = of(&x, 100);
        let counter = BlockGeometry::new(&[n as i64], &[1], &[], None).unwrap();
        let walk = GroupWalk::new(&counter);
        let counter = Counter {
            walk: &walk,
            values: Values::F32(&x),
            bins: 100,
            growth: None,
        };
        let alone = counter
            .count(0..1, &|_| None, &mut Workspace::default())
            .unwrap();
        assert_eq!(whole.groups(), alone);
        assert_eq!(alone[0].total(), n as u64);
    }

    fn batches() -> impl Strategy<Value = Vec<Vec<f32>>> {
        let value = prop_oneof![
            -10.0_f32..10.0,
            Just(0.0_f32),
            -1e-6_f32..1e-6,
            -1e9_f32..1e9,
            (0_u8..4).prop_map(f32::from),
        ];
        proptest::collection::vec(proptest::collection::vec(value, 1..40), 1..7)
    }

    proptest! {
        /// Any order, any split over processes: the same state, and no count lost.
        #[test]
        fn merging_is_a_sum(batches in batches(), seed in 0_usize..1000, ranks in 1_usize..4) {
            let bins = 16;
            let mut one = HistogramStatistics::new(bins, None).unwrap();
            for x in &batches {
                one.update(Values::F32(x), &per_tensor(x.len())).unwrap();
            }
            let mut order: Vec<usize> = (0..batches.len()).collect();
            let mut s = seed;
            for i in (1..order.len()).rev() { order.swap(i, s % (i + 1)); s = s / (i + 1) + 7; }
            let mut parts = vec![HistogramStatistics::new(bins, None).unwrap(); ranks];
            for (i, &b) in order.iter().enumerate() {
                let x = &batches[b];
                parts[i % ranks].update(Values::F32(x), &per_tensor(x.len())).unwrap();
            }
            let mut merged = HistogramStatistics::new(bins, None).unwrap();
            for part in parts.into_iter().rev() { merged.merge(part).unwrap(); }
            prop_assert_eq!(&merged, &one);

            let g = &one.groups()[0];
            prop_assert_eq!(g.total() as usize, batches.iter().map(Vec::len).sum::<usize>());
            prop_assert!(g.is_valid(bins as u32));
            let all = batches.concat();
            prop_assert_eq!(g.min(), all.iter().copied().fold(f32::INFINITY, f32::min));
            prop_assert_eq!(g.max(), all.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            // Flat arrays hold everything.
            let mut back = HistogramStatistics::new(bins, None).unwrap();
            back.set_parts(&one.to_parts()).unwrap();
            prop_assert_eq!(back, one);
        }

        /// Cumulative counts on the lattice are off by no more than the width of a batch's bin.
        #[test]
        fn lattice_counts_stay_near_their_place(
            x in proptest::collection::vec(-3.0_f32..5.0, 2..60),
            y in proptest::collection::vec(-4.0_f32..2.0, 2..60),
        ) {
            let bins = 32;
            let mut s = of(&x, bins);
            s.update(Values::F32(&y), &per_tensor(y.len())).unwrap();
            let g = &s.groups()[0];
            let Bins::Lattice { level } = g.bins() else { panic!() };
            let width = exp2(level) as f32;
            let off = 8.0 / bins as f32 + width;
            let all = [x, y].concat();
            let (index, count) = g.counts();
            let mut below = 0;
            for (&i, &n) in index.iter().zip(count) {
                below += n as usize;
                let right = (i + 1) as f32 * width;
                let surely = all.iter().filter(|&&v| v < right - off).count();
                let perhaps = all.iter().filter(|&&v| v <= right + off).count();
                prop_assert!((surely..=perhaps).contains(&below));
            }
        }

        #[test]
        fn hostile_parts_are_refused(level in -2000_i32..2000, index in -50_i32..50, count in -3_i64..3,
                                     min in proptest::num::f32::ANY, max in proptest::num::f32::ANY) {
            let mut s = HistogramStatistics::new(8, None).unwrap();
            let parts = Parts {
                range: vec![min, max, f32::NEG_INFINITY, f32::INFINITY, min, max],
                level: vec![level], start: vec![0, 1], index: vec![index], count: vec![count],
            };
            if s.set_parts(&parts).is_ok() {
                prop_assert!(count > 0 && min <= max && min.is_finite() && max.is_finite());
            }
        }
    }
}
