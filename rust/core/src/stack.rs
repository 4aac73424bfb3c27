//! Many images into one array, in parallel.
//!
//! The problem: a volume is hundreds of files of half a megabyte. Reading each whole, converting it
//! and copying it into place moves every voxel several times. Here each image is read in parts that
//! stay in the cache and converted straight into its own slice of the array that the caller gave.
//!
//! Threads live for one call only: there is no pool that a fork could break.

use std::num::NonZero;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use crate::error::{Error, Result};
use crate::image::Image;
use crate::pixels::{Conversion, Format, Value};
use crate::scan::{PIXEL_DATA, UNDEFINED};
use crate::source::{self, Source};

/// Bytes of a file that are read and converted at a time.
const PART: usize = 256 << 10;
/// Values below which a second thread costs more than it brings.
const FEW: usize = 1 << 16;

/// One image and where its bytes are.
#[derive(Debug, Clone, Copy)]
pub struct Slice<'a> {
    pub image: &'a Image,
    /// The source that `image` was scanned from.
    pub source: Source<'a>,
}

/// Write image `k` to the `k`-th `rows * columns` values of `out`.
///
/// With `rescale` a value is `stored * slope + intercept`, else it is the stored one.
///
/// Errors: [`Error::UnsupportedImage`] for pixels that are not native, or have several samples or
/// frames; [`Error::InvalidDicom`] for pixel data that is too short, another size, contradictory
/// bits or a slope of zero; [`Error::InvalidDataset`] for values that `T` cannot hold;
/// [`Error::Io`]. What `out` holds after an error is not defined.
pub fn stack<T: Value>(
    slices: &[Slice<'_>],
    rows: usize,
    columns: usize,
    out: &mut [T],
    rescale: bool,
) -> Result<()> {
    let size = rows.checked_mul(columns);
    let Some(size) = size.filter(|size| size.checked_mul(slices.len()) == Some(out.len())) else {
        return Err(Error::invalid(format!(
            "expected an array of {} x {rows} x {columns} values, found {}",
            slices.len(),
            out.len()
        )));
    };
    let uid = |slice: &Slice<'_>| slice.image.sop_instance_uid.clone();
    let mut plans = Vec::with_capacity(slices.len());
    for (place, slice) in slices.iter().enumerate() {
        let plan = Plan::new::<T>(slice, rows, columns, rescale);
        plans.push(plan.map_err(|error| error.of(&uid(slice)).in_place(place))?);
    }
    if size == 0 {
        return Ok(());
    }
    let threads = if out.len() < FEW { 1 } else { slices.len() };
    let work = slices
        .iter()
        .zip(plans)
        .zip(out.chunks_exact_mut(size))
        .enumerate();
    parallel(
        work,
        threads,
        Vec::new,
        |buffer, (place, ((slice, plan), out))| {
            plan.fill(slice, out, buffer)
                .map_err(|error| error.of(&uid(slice)).in_place(place))
        },
    )?;
    Ok(())
}

/// What is to be done for one image, checked.
struct Plan {
    format: Format,
    conversion: Conversion,
    offset: u64,
    bytes: u64,
}

impl Plan {
    fn new<T: Value>(
        slice: &Slice<'_>,
        rows: usize,
        columns: usize,
        rescale: bool,
    ) -> Result<Self> {
        let image = slice.image;
        if !image.is_native {
            let found = match image.pixel_tag {
                0 => "no pixel data",
                _ => "compressed pixel data",
            };
            let syntax = &image.transfer_syntax;
            return Err(Error::unsupported(format!(
                "expected native pixel data, found {found} (transfer syntax {syntax})"
            )));
        }
        if image.pixel_tag != PIXEL_DATA {
            let message = "expected Pixel Data of integers, found floats";
            return Err(Error::unsupported(message).at(image.pixel_tag));
        }
        if image.samples_per_pixel != 1 {
            let message = format!(
                "expected 1 sample per pixel, found {}",
                image.samples_per_pixel
            );
            return Err(Error::unsupported(message).at(0x0028_0002));
        }
        if image.number_of_frames != 1 {
            let message = format!("expected 1 frame, found {}", image.number_of_frames);
            return Err(Error::unsupported(message).at(0x0028_0008));
        }
        for (tag, expected, found) in [
            (0x0028_0010, rows, image.rows),
            (0x0028_0011, columns, image.columns),
        ] {
            if u32::try_from(expected) != Ok(found) {
                return Err(Error::invalid_at(
                    tag,
                    format!("expected {expected}, found {found}"),
                ));
            }
        }
        let format = Format::new(
            image.bits_allocated,
            image.bits_stored,
            image.high_bit,
            image.pixel_representation,
            image.big_endian_pixels,
            image.swapped_pairs,
        )?;
        let pixels = u64::from(image.rows).checked_mul(u64::from(image.columns));
        let bytes = pixels.and_then(|pixels| format.bytes(pixels));
        let bytes = bytes
            .filter(|bytes| *bytes < u64::from(UNDEFINED))
            .ok_or_else(|| {
                Error::invalid("expected an image of less than 4 GiB, found a larger one")
            })?;
        if image.pixel_length < bytes {
            return Err(short(bytes, image.pixel_length));
        }
        let (slope, intercept) = if rescale {
            (image.slope, image.intercept)
        } else {
            (1.0, 0.0)
        };
        for (tag, value) in [(0x0028_1053, slope), (0x0028_1052, intercept)] {
            if !value.is_finite() {
                return Err(Error::invalid_at(
                    tag,
                    format!("expected a number, found {value}"),
                ));
            }
        }
        if slope == 0.0 {
            return Err(Error::invalid_at(
                0x0028_1053,
                "expected a slope other than 0, found 0",
            ));
        }
        let conversion = Conversion::new::<T>(format, slope, intercept);
        Ok(Plan {
            format,
            conversion,
            offset: image.pixel_offset,
            bytes,
        })
    }

    fn fill<T: Value>(
        mut self,
        slice: &Slice<'_>,
        out: &mut [T],
        buffer: &mut Vec<u8>,
    ) -> Result<()> {
        match (&slice.image.inflated, slice.source) {
            (Some(bytes), _) => self.fill_from_bytes(bytes, out)?,
            (None, Source::Bytes(bytes)) => self.fill_from_bytes(bytes, out)?,
            (None, Source::File(path)) => self.fill_from_file(path, out, buffer)?,
        }
        self.conversion.finish::<T>()
    }

    fn fill_from_bytes<T: Value>(&mut self, bytes: &[u8], out: &mut [T]) -> Result<()> {
        let start = usize::try_from(self.offset).unwrap_or(usize::MAX);
        let rest = bytes.get(start..).unwrap_or_default();
        let length = usize::try_from(self.bytes).unwrap_or(usize::MAX);
        let Some(pixels) = rest.get(..length) else {
            return Err(short(self.bytes, rest.len() as u64));
        };
        self.conversion.run(pixels, out);
        Ok(())
    }

    fn fill_from_file<T: Value>(
        &mut self,
        path: &Path,
        out: &mut [T],
        buffer: &mut Vec<u8>,
    ) -> Result<()> {
        let (file, _) = source::open(path)?;
        buffer.resize(PART, 0);
        let mut done = 0_u64;
        for out in out.chunks_mut(PART / self.format.cell()) {
            let part = (self.bytes - done).min(PART as u64) as usize;
            let part = buffer.get_mut(..part).unwrap_or_default();
            let found = source::read_at(&file, path, self.offset + done, part)?;
            if found < part.len() {
                return Err(short(self.bytes, done + found as u64));
            }
            self.conversion.run(part, out);
            done += found as u64;
        }
        Ok(())
    }
}

fn short(expected: u64, found: u64) -> Error {
    Error::invalid_at(
        PIXEL_DATA,
        format!("expected at least {expected} bytes, found {found}"),
    )
}

/// Do `job` for every item of `work` on up to `threads` threads; the results in order.
///
/// The first error in the order of `work` ends it. Each thread has its own `state`.
pub(crate) fn parallel<W, S, R>(
    work: W,
    threads: usize,
    state: impl Fn() -> S + Sync,
    job: impl Fn(&mut S, W::Item) -> Result<R> + Sync,
) -> Result<Vec<R>>
where
    W: Iterator + Send,
    R: Send,
{
    let threads = threads.clamp(1, processors());
    if threads == 1 {
        let mut state = state();
        return work.map(|item| job(&mut state, item)).collect();
    }
    let queue = Mutex::new(work.enumerate());
    let stop = AtomicBool::new(false);
    let worker = || {
        let mut state = state();
        let mut done = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            // Items are handed out in order, so every item before a failed one was begun.
            let item = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((place, item)) = item else { break };
            match job(&mut state, item) {
                Ok(result) => done.push((place, result)),
                Err(error) => {
                    stop.store(true, Ordering::Relaxed);
                    return (done, Some((place, error)));
                }
            }
        }
        (done, None)
    };
    let mut outcomes = thread::scope(|scope| {
        // Where the system has no more threads, fewer do the same work.
        let others: Vec<_> = (1..threads)
            .map_while(|_| thread::Builder::new().spawn_scoped(scope, worker).ok())
            .collect();
        let mut outcomes = vec![worker()];
        for other in others {
            outcomes.push(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        outcomes
    });
    let failed = outcomes.iter_mut().filter_map(|(_, error)| error.take());
    if let Some((_, error)) = failed.min_by_key(|(place, _)| *place) {
        return Err(error);
    }
    let mut results: Vec<(usize, R)> = outcomes.into_iter().flat_map(|(done, _)| done).collect();
    results.sort_unstable_by_key(|(place, _)| *place);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

/// How many threads can run at once; asked once, because the answer is read from files.
fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get))
}

#[cfg(test)]
mod tests;
