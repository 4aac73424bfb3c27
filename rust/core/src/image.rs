//! The attributes that stacking needs, out of a scanned header.
//!
//! The problem: geometry and rescale decide where a voxel lies and what it means, and they arrive as
//! text that anybody may have written. An attribute that is absent has its documented default; one
//! that is present and cannot be understood is an error that names it. Nothing is guessed.

use std::sync::{Arc, OnceLock};

use crate::encapsulated::{Fragment, Frames};
use crate::error::{Error, Result};
use crate::functional;
use crate::pixels::Lut;
use crate::scan::{self, Encoding, Entry, Kept, Layout, UNDEFINED};
use crate::source::{Opened, Source, Stamp};
use crate::stack::parallel;

/// CT Image Storage.
const CT_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.2";
/// Memory that the frames of any object may take.
const FREE_BYTES: u64 = 32 << 20;
/// Memory that they may take beyond that, for each byte of the object.
const MAX_RATIO: u64 = 64;

/// How far the first coordinate of a dose grid may be off the position, mm.
const GRID_MM: f64 = 0.01;

/// What stacking needs to know of one image.
#[derive(Debug, Clone, Default)]
pub struct Image {
    pub sop_class_uid: String,
    pub sop_instance_uid: String,
    pub study_instance_uid: String,
    pub series_instance_uid: String,
    pub frame_of_reference_uid: String,
    pub transfer_syntax: String,
    pub modality: String,
    /// The whole value, backslash between the values.
    pub image_type: String,
    pub photometric_interpretation: String,
    pub rows: u32,
    pub columns: u32,
    pub samples_per_pixel: u32,
    pub planar_configuration: u32,
    pub bits_allocated: u32,
    pub bits_stored: u32,
    pub high_bit: u32,
    pub pixel_representation: u32,
    pub number_of_frames: u32,
    pub slope: f64,
    pub intercept: f64,
    /// Rescale Slope or Rescale Intercept is present and not empty.
    pub has_rescale: bool,
    /// What rescaled values are measured in, such as HU or BQML; empty where the object does not say.
    pub units: String,
    /// Image Position (Patient), mm.
    pub position: Option<[f64; 3]>,
    /// Image Orientation (Patient).
    pub orientation: Option<[f64; 6]>,
    /// Pixel Spacing, mm: between rows, between columns.
    pub pixel_spacing: Option<[f64; 2]>,
    pub slice_thickness: Option<f64>,
    pub spacing_between_slices: Option<f64>,
    pub instance_number: Option<i64>,
    /// Modality LUT Sequence (0028,3000): how it is encoded, and where it lies.
    pub modality_lut: Option<Encoded>,
    /// The table of the Modality LUT, once somebody read it: one for all frames.
    pub modality_table: Arc<OnceLock<Arc<Lut>>>,
    /// What stored values mean; counts more than slope and intercept, and the Modality LUT.
    pub lut: Option<Arc<Lut>>,
    pub has_functional_groups: bool,
    /// How the object is encoded, and where its functional groups lie: shared, per frame.
    pub groups: Option<Groups>,
    /// Grid Frame Offset Vector (3004,000C), mm; empty where absent.
    pub grid_offsets: Vec<f64>,
    /// Tag of the pixel data, 0 without.
    pub pixel_tag: u32,
    /// The pixel data is uncompressed.
    pub is_native: bool,
    /// The pixel data is in fragments.
    pub is_encapsulated: bool,
    /// Where the value of the Extended Offset Table (7FE0,0001) lies.
    pub extended_offsets: Option<Fragment>,
    /// The frames in the fragments, once somebody looked for them.
    pub frames: Arc<OnceLock<Frames>>,
    /// Which frame of the object this is, from 0.
    pub frame: u32,
    /// Stack ID (0020,9056) of the frame.
    pub stack_id: String,
    /// Which slice of its stack a frame says it is: the dimension index of the position, or In-Stack
    /// Position Number (0020,9057).
    pub position_index: Option<u32>,
    /// What a caller asked for besides, as far as it is there and not a sequence.
    pub extra: Vec<Extra>,
    /// What to look for besides in functional groups.
    pub extra_tags: Arc<[u32]>,
    /// The values of the dataset are encoded big endian.
    pub big_endian: bool,
    /// Where the pixel data starts: in the source, or in `inflated`.
    pub pixel_offset: u64,
    pub pixel_length: u64,
    pub big_endian_pixels: bool,
    /// 8 bit cells are swapped in pairs: big endian in a 16 bit word (PS3.5 section 8.1.1).
    pub swapped_pairs: bool,
    /// The object, where it was deflated.
    pub inflated: Option<Arc<Vec<u8>>>,
    /// The state of the file that this was scanned from.
    pub stamp: Option<Stamp>,
}

impl Image {
    /// What stored values mean by a table: the one that was given, or the Modality LUT.
    pub(crate) fn table(&self, source: Source<'_>) -> Result<Option<Arc<Lut>>> {
        let Some(Encoded { encoding, entry }) = self.modality_lut else {
            return Ok(self.lut.clone());
        };
        if let Some(table) = self.lut.as_ref().or(self.modality_table.get()) {
            return Ok(Some(table.clone()));
        }
        let opened = self.open(source)?;
        let table = functional::modality_lut(self, &opened, encoding, entry)?;
        // Where another thread was faster, both found the same.
        Ok(Some(
            self.modality_table.get_or_init(|| Arc::new(table)).clone(),
        ))
    }

    /// The error where a copy of it for each frame takes more memory than `size` bytes justify.
    ///
    /// A few bytes can declare millions of frames, and have a text of kilobytes that each repeats.
    pub(crate) fn check_copies(&self, size: u64) -> Result<()> {
        let texts = [
            &self.sop_class_uid,
            &self.sop_instance_uid,
            &self.study_instance_uid,
            &self.series_instance_uid,
            &self.frame_of_reference_uid,
            &self.transfer_syntax,
            &self.modality,
            &self.image_type,
            &self.photometric_interpretation,
            &self.units,
            &self.stack_id,
        ];
        let texts: usize = texts.iter().map(|text| text.len()).sum();
        let extra = self
            .extra
            .iter()
            .map(|one| one.value.len() + size_of::<Extra>());
        let lists = size_of_val(self.grid_offsets.as_slice()) + extra.sum::<usize>();
        let each = size_of::<Self>() + texts + lists;
        let count = self.number_of_frames;
        let bytes = u64::from(count).saturating_mul(each as u64);
        if count > 1 && bytes > FREE_BYTES.saturating_add(size.saturating_mul(MAX_RATIO)) {
            let message = format!(
                "expected frames that fit an object of {size} bytes, found {count} of {each} bytes \
                 of attributes"
            );
            return Err(Error::invalid_at(0x0028_0008, message));
        }
        Ok(())
    }

    /// Open the object that this was scanned from.
    ///
    /// Errors: [`Error::InvalidDicom`] for a file that was changed since; [`Error::Io`].
    pub(crate) fn open<'a>(&'a self, source: Source<'a>) -> Result<Opened<'a>> {
        if let Some(bytes) = &self.inflated {
            return Ok(Opened::Bytes(bytes));
        }
        let opened = source.open()?;
        if let (Opened::File { stamp, .. }, Some(scanned)) = (&opened, &self.stamp)
            && !stamp.is_same_content(scanned)
        {
            return Err(Error::invalid(
                "expected the file whose header was read, found that it was changed since; load it \
                 again",
            ));
        }
        Ok(opened)
    }

    /// Whether a scan of `source` would find the same again.
    fn is_current(&self, source: Source<'_>) -> Result<bool> {
        match source {
            Source::Bytes(_) => Ok(true),
            Source::File(path) => Ok(self.stamp == Some(Stamp::now(path)?)),
        }
    }

    /// Where a frame lies: by the Grid Frame Offset Vector (PS3.3 C.8.8.3.2), and without it a
    /// single frame only.
    fn grid_position(&self, frame: u32) -> Option<[f64; 3]> {
        if self.grid_offsets.is_empty() && self.number_of_frames == 1 {
            return self.position;
        }
        if self.grid_offsets.len() != self.number_of_frames as usize {
            return None;
        }
        let first = *self.grid_offsets.first()?;
        let offset = *self.grid_offsets.get(frame as usize)? - first;
        let ([x, y, z], [a, b, c, d, e, f]) = (self.position?, self.orientation?);
        // Offsets that start with 0 go along the normal; others are coordinates of z.
        let [i, j, k] = if first == 0.0 {
            [b * f - c * e, c * d - a * f, a * e - b * d]
        } else {
            [0.0, 0.0, 1.0]
        };
        Some([x + offset * i, y + offset * j, z + offset * k])
    }
}

/// A sequence: how it is encoded, and where it lies.
#[derive(Debug, Clone, Copy)]
pub struct Encoded {
    encoding: Encoding,
    entry: Entry,
}

/// An attribute that a caller asked for: its tag, its VR as written and its raw value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extra {
    pub tag: u32,
    pub vr: [u8; 2],
    pub value: Vec<u8>,
}

/// How an enhanced object is encoded, and where its functional groups lie: shared, per frame; and
/// the Dimension Index Sequence.
#[derive(Debug, Clone, Copy)]
pub struct Groups {
    encoding: Encoding,
    groups: [Option<Entry>; 2],
    dimensions: Option<Entry>,
}

/// Scan many objects in parallel; order and length as given, or the error of the first bad one.
pub fn scan_images(sources: &[Source<'_>]) -> Result<Vec<Image>> {
    let given: Vec<_> = sources.iter().map(|source| (*source, None)).collect();
    Ok(scan_changed(&given, &[])?.into_iter().flatten().collect())
}

/// Scan objects again whose file is no longer in the state that an earlier scan found, or that were
/// scanned for other `extra_tags`; None for an image that still holds. Values of `extra_tags` are kept.
///
/// Order, length and errors as with [`scan_images`].
pub fn scan_changed(
    given: &[(Source<'_>, Option<&Image>)],
    extra_tags: &[u32],
) -> Result<Vec<Option<Image>>> {
    let extra_tags: Arc<[u32]> = extra_tags.into();
    // A header takes some ten microseconds, about as long as it takes to start a thread.
    let work = given.iter().enumerate();
    parallel(
        work,
        given.len() / 16,
        Vec::new,
        |buffer, (place, (source, known))| {
            let is_current = known.map_or(Ok(false), |image| {
                Ok(image.extra_tags == extra_tags && image.is_current(*source)?)
            });
            let scanned = is_current.and_then(|is_current| match is_current {
                true => Ok(None),
                false => scan_one(*source, &extra_tags, buffer).map(Some),
            });
            scanned.map_err(|error| error.in_place(place))
        },
    )
}

/// Scan one object; `buffer` is reused from file to file.
///
/// Of an object with several frames, the image tells what they have in common; see [`frames`].
pub fn scan_image(source: Source<'_>, buffer: &mut Vec<u8>) -> Result<Image> {
    scan_one(source, &Arc::from([]), buffer)
}

fn scan_one(source: Source<'_>, extra_tags: &Arc<[u32]>, buffer: &mut Vec<u8>) -> Result<Image> {
    scan::scan_with(source, None, buffer, |layout, kept| {
        let mut image = image_of(&layout, &kept, extra_tags)?;
        if let Kept::Inflated(bytes) = kept {
            image.inflated = Some(Arc::new(bytes));
        }
        Ok(image)
    })
}

/// The image of an object that was scanned; it does not have its inflated bytes yet.
pub(crate) fn image_of(layout: &Layout, kept: &Kept<'_>, extra_tags: &Arc<[u32]>) -> Result<Image> {
    let mut image = Attributes { layout, kept }.image()?;
    if image.has_functional_groups {
        let find = |tag| layout.find(tag).copied();
        let groups = [find(functional::SHARED), find(functional::PER_FRAME)];
        let encoding = layout.encoding();
        image.groups = Some(Groups {
            encoding,
            groups,
            dimensions: find(functional::DIMENSIONS),
        });
    }
    for tag in extra_tags.iter() {
        if let Some(entry) = layout.find(*tag)
            && let Some(value) = kept.value(entry)
        {
            image.extra.push(Extra {
                tag: *tag,
                vr: entry.vr,
                value: value.to_vec(),
            });
        }
    }
    image.extra_tags = Arc::clone(extra_tags);
    Ok(image)
}

/// A text attribute of an object that was scanned, without padding; empty where absent.
pub(crate) fn text_of(layout: &Layout, kept: &Kept<'_>, tag: u32) -> Result<String> {
    Attributes { layout, kept }.text(tag)
}

/// One image for each frame of an object, in the order of the file.
///
/// Without functional groups only a single frame has a place in the patient.
///
/// Errors: [`Error::InvalidDicom`] for functional groups that cannot be understood; [`Error::Io`].
pub fn frames(image: &Image, source: Source<'_>) -> Result<Vec<Image>> {
    let size = match source {
        _ if image.is_native => image.pixel_length,
        source => image.open(source)?.size(),
    };
    // No frame takes less than a bit, or a fragment.
    let most = match image.is_native {
        true => size.saturating_mul(8),
        false => size / 8,
    };
    if u64::from(image.number_of_frames) > most.max(1) {
        let count = image.number_of_frames;
        let message = format!("expected no more frames than the pixel data holds, found {count}");
        return Err(Error::invalid_at(0x0028_0008, message).of(&image.sop_instance_uid));
    }
    // The two forms of PS3.3 C.8.8.3.2.
    if let (Some(first), Some([_, _, z])) = (image.grid_offsets.first(), image.position)
        && *first != 0.0
        && (first - z).abs() > GRID_MM
    {
        let message = format!("expected 0 or the z of the position, {z}, first, found {first}");
        return Err(Error::invalid_at(0x3004_000C, message).of(&image.sop_instance_uid));
    }
    let made = match image.groups {
        Some(Groups {
            encoding,
            groups,
            dimensions,
        }) => {
            let opened = image.open(source)?;
            functional::frames(image, &opened, encoding, groups, dimensions)
        }
        None => image.check_copies(size).map(|()| {
            let frame = |frame| Image {
                frame,
                position: image.grid_position(frame),
                ..image.clone()
            };
            (0..image.number_of_frames).map(frame).collect()
        }),
    };
    made.map_err(|error| error.of(&image.sop_instance_uid))
}

/// Typed values of one object.
struct Attributes<'a> {
    layout: &'a Layout,
    kept: &'a Kept<'a>,
}

impl Attributes<'_> {
    fn image(&self) -> Result<Image> {
        let sop_instance_uid = self.text(0x0008_0018)?;
        self.read(sop_instance_uid.clone())
            .map_err(|error| error.of(&sop_instance_uid))
    }

    fn read(&self, sop_instance_uid: String) -> Result<Image> {
        let bits_allocated = self.unsigned(0x0028_0100)?.unwrap_or(0);
        let bits_stored = self.unsigned(0x0028_0101)?.unwrap_or(bits_allocated);
        let pixels = self.layout.pixels();
        let big_endian_pixels = self.layout.big_endian_pixels();
        let frames = match self.integer(0x0028_0008)? {
            None | Some(0) => 1,
            Some(frames) => u32::try_from(frames).map_err(|_| {
                let found = format!("expected a number of frames, found {frames}");
                Error::invalid_at(0x0028_0008, found)
            })?,
        };
        // Dose Grid Scaling is the slope of an RT Dose (PS3.3 C.8.8.3).
        let slope = match self.decimal(0x0028_1053)? {
            None => self.decimal(0x3004_000E)?,
            slope => slope,
        };
        let intercept = self.decimal(0x0028_1052)?;
        let encoding = self.layout.encoding();
        let modality_lut = self.layout.find(0x0028_3000);
        let modality_lut = modality_lut.filter(|entry| entry.length > 0);
        let modality_lut = modality_lut.map(|entry| Encoded {
            encoding,
            entry: *entry,
        });
        let has_rescale = slope.is_some() || intercept.is_some();
        Ok(Image {
            sop_instance_uid,
            sop_class_uid: self.text(0x0008_0016)?,
            study_instance_uid: self.text(0x0020_000D)?,
            series_instance_uid: self.text(0x0020_000E)?,
            frame_of_reference_uid: self.text(0x0020_0052)?,
            transfer_syntax: self.layout.transfer_syntax().to_owned(),
            modality: self.text(0x0008_0060)?,
            image_type: self.text(0x0008_0008)?,
            photometric_interpretation: self.text(0x0028_0004)?,
            rows: self.unsigned(0x0028_0010)?.unwrap_or(0),
            columns: self.unsigned(0x0028_0011)?.unwrap_or(0),
            samples_per_pixel: self.unsigned(0x0028_0002)?.unwrap_or(1),
            planar_configuration: self.unsigned(0x0028_0006)?.unwrap_or(0),
            bits_allocated,
            bits_stored,
            high_bit: self
                .unsigned(0x0028_0102)?
                .unwrap_or(bits_stored.saturating_sub(1)),
            pixel_representation: self.unsigned(0x0028_0103)?.unwrap_or(0),
            number_of_frames: frames,
            slope: slope.unwrap_or(1.0),
            intercept: intercept.unwrap_or(0.0),
            has_rescale: has_rescale || modality_lut.is_some(),
            units: self.units(has_rescale)?,
            position: self.decimals(0x0020_0032)?,
            orientation: self.decimals(0x0020_0037)?,
            pixel_spacing: self.decimals(0x0028_0030)?,
            slice_thickness: self.decimal(0x0018_0050)?,
            spacing_between_slices: self.decimal(0x0018_0088)?,
            // Nothing depends on it unless a user asks for it: garbage counts as absent.
            instance_number: self.integer(0x0020_0013).unwrap_or_default(),
            modality_lut,
            modality_table: Arc::default(),
            lut: None,
            has_functional_groups: self.layout.find(0x5200_9229).is_some()
                || self.layout.find(0x5200_9230).is_some(),
            groups: None,
            grid_offsets: self.offsets(0x3004_000C)?,
            pixel_tag: pixels.map_or(0, |entry| entry.tag),
            is_native: self.layout.is_native(),
            is_encapsulated: pixels.is_some_and(|entry| entry.length == UNDEFINED),
            extended_offsets: self.layout.find(0x7FE0_0001).map(|entry| Fragment {
                offset: entry.offset,
                length: entry.length,
            }),
            frames: Arc::default(),
            frame: 0,
            stack_id: String::new(),
            position_index: None,
            extra: Vec::new(),
            extra_tags: Arc::from([]),
            big_endian: self.layout.big_endian(),
            pixel_offset: pixels.map_or(0, |entry| entry.offset),
            pixel_length: pixels
                .filter(|entry| entry.length != UNDEFINED)
                .map_or(0, |entry| u64::from(entry.length)),
            big_endian_pixels,
            swapped_pairs: big_endian_pixels
                && bits_allocated == 8
                && pixels.is_some_and(|entry| entry.vr() != "OB"),
            inflated: None,
            stamp: self.kept.stamp(),
        })
    }

    /// Units (0054,1001) of PET, Dose Units (3004,0002), or Rescale Type (0028,1054). Where a CT Image
    /// has none these are Hounsfield units (PS3.3 C.8.2.1), unless it is a localizer or multi-energy.
    fn units(&self, has_rescale: bool) -> Result<String> {
        for tag in [0x0054_1001, 0x3004_0002, 0x0028_1054] {
            let text = self.text(tag)?;
            if !text.is_empty() {
                return Ok(text);
            }
        }
        let is_hounsfield = has_rescale
            && self.text(0x0008_0016)? == CT_IMAGE
            && self.text(0x0018_9361)? != "YES"
            && self.text(0x0008_0008)?.split('\\').nth(2).map(str::trim) != Some("LOCALIZER");
        Ok(if is_hounsfield { "HU" } else { "" }.to_owned())
    }

    /// The value of an element that is present and not empty.
    fn value(&self, tag: u32) -> Result<Option<(&Entry, &[u8])>> {
        let Some(entry) = self.layout.find(tag).filter(|entry| entry.length > 0) else {
            return Ok(None);
        };
        match self.kept.value(entry) {
            Some(value) => Ok(Some((entry, value))),
            None => Err(Error::invalid_at(
                tag,
                "expected a short value, found a long one",
            )),
        }
    }

    /// Text without padding; an attribute here is a UID or a code, whose repertoire is ASCII.
    fn text(&self, tag: u32) -> Result<String> {
        let Some((_, value)) = self.value(tag)? else {
            return Ok(String::new());
        };
        let value = match std::str::from_utf8(value) {
            Ok(text) => text.trim_matches(['\0', ' ']).to_owned(),
            Err(_) => {
                let text: String = value.iter().map(|byte| char::from(*byte)).collect();
                text.trim_matches(['\0', ' ']).to_owned()
            }
        };
        Ok(value)
    }

    /// One unsigned number: US, or SS or UL as some writers have it.
    fn unsigned(&self, tag: u32) -> Result<Option<u32>> {
        let Some((entry, value)) = self.value(tag)? else {
            return Ok(None);
        };
        let big = self.layout.big_endian();
        let wrong = || {
            let (vr, length) = (entry.vr(), entry.length);
            Error::invalid_at(
                tag,
                format!("expected one US value, found {length} bytes of {vr}"),
            )
        };
        match (entry.vr(), value) {
            ("US" | "UN" | "", &[a, b]) => {
                let number = if big { [a, b] } else { [b, a] };
                Ok(Some(u16::from_be_bytes(number).into()))
            }
            ("SS", &[a, b]) => {
                let number = i16::from_be_bytes(if big { [a, b] } else { [b, a] });
                match u32::try_from(number) {
                    Ok(number) => Ok(Some(number)),
                    Err(_) => Err(Error::invalid_at(
                        tag,
                        format!("expected ≥ 0, found {number}"),
                    )),
                }
            }
            ("UL" | "UN" | "", &[a, b, c, d]) => {
                let number = if big { [a, b, c, d] } else { [d, c, b, a] };
                Ok(Some(u32::from_be_bytes(number)))
            }
            _ => Err(wrong()),
        }
    }

    /// One integer string (IS).
    fn integer(&self, tag: u32) -> Result<Option<i64>> {
        let Some([number]) = self.decimals::<1>(tag)? else {
            return Ok(None);
        };
        // Up to 2^53 an f64 is exact, and IS ends at 2^31.
        if number.fract() != 0.0 || number.abs() > 9_007_199_254_740_992.0 {
            return Err(Error::invalid_at(
                tag,
                format!("expected an integer, found {number}"),
            ));
        }
        Ok(Some(number as i64))
    }

    /// Any number of decimal strings (DS).
    fn offsets(&self, tag: u32) -> Result<Vec<f64>> {
        let Some((_, value)) = self.value(tag)? else {
            return Ok(Vec::new());
        };
        let numbers = value.split(|byte| *byte == b'\\').map(decimal);
        numbers.collect::<Option<_>>().ok_or_else(|| {
            Error::invalid_at(tag, "expected finite decimal numbers, found something else")
        })
    }

    /// One decimal string (DS).
    fn decimal(&self, tag: u32) -> Result<Option<f64>> {
        Ok(self.decimals::<1>(tag)?.map(|[number]| number))
    }

    /// Exactly `N` decimal strings, all finite; None where the value is absent or blank.
    fn decimals<const N: usize>(&self, tag: u32) -> Result<Option<[f64; N]>> {
        let Some((_, value)) = self.value(tag)? else {
            return Ok(None);
        };
        decimals(value).map_err(|message| Error::invalid_at(tag, message))
    }
}

/// Parse `N` decimal strings (PS3.5 section 6.2: DS, IS), tolerant of NUL padding and of the comma.
pub(crate) fn decimals<const N: usize>(
    value: &[u8],
) -> std::result::Result<Option<[f64; N]>, String> {
    let blank = |byte: &u8| matches!(byte, 0 | b' ');
    if value.iter().all(blank) {
        return Ok(None);
    }
    let mut numbers = [0.0; N];
    let mut found = 0;
    for text in value.split(|byte| *byte == b'\\') {
        if let Some(number) = numbers.get_mut(found) {
            *number = decimal(text).ok_or_else(|| {
                format!(
                    "expected {N} finite decimal number(s), value {} is none",
                    found + 1
                )
            })?;
        }
        found += 1;
    }
    if found == N {
        Ok(Some(numbers))
    } else {
        Err(format!("expected {N} value(s), found {found}"))
    }
}

fn decimal(text: &[u8]) -> Option<f64> {
    let mut plain = [0_u8; 64];
    let text = trim(text);
    let plain = plain.get_mut(..text.len())?;
    plain.copy_from_slice(text);
    let mut commas = 0;
    for byte in plain.iter_mut() {
        if *byte == b',' {
            *byte = b'.';
            commas += 1;
        }
    }
    if commas > 1 {
        return None;
    }
    std::str::from_utf8(plain)
        .ok()?
        .parse()
        .ok()
        .filter(|number: &f64| number.is_finite())
}

fn trim(mut text: &[u8]) -> &[u8] {
    while let [0 | b' ', rest @ ..] | [rest @ .., 0 | b' '] = text {
        text = rest;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{EXPLICIT, Writer};

    #[test]
    fn decimal_strings_are_read_as_writers_write_them() {
        let one = |text: &[u8]| decimals::<1>(text).map(|found| found.map(|[number]| number));
        assert_eq!(one(b"-1.2e-015 "), Ok(Some(-1.2e-15)));
        assert_eq!(one(b" 1,5\0"), Ok(Some(1.5)));
        assert_eq!(one(b"+3"), Ok(Some(3.0)));
        assert_eq!(one(b" \0 "), Ok(None));
        assert_eq!(decimals::<2>(b"0.5\\ .25 "), Ok(Some([0.5, 0.25])));
    }

    #[test]
    fn garbage_is_an_error_and_never_a_default() {
        let bad: [&[u8]; 8] = [
            b"x",
            b"nan",
            b"inf",
            b"1e999",
            b"1\\2",
            b"1,2,3",
            b"\\",
            &[b'1'; 65_000],
        ];
        for text in bad {
            assert!(decimals::<1>(text).is_err(), "{text:?}");
        }
        assert!(decimals::<3>(b"1\\2").is_err());
        assert!(decimals::<3>(b"1\\2\\").is_err());
    }

    #[test]
    fn frames_take_no_more_memory_than_their_object_justifies() {
        let object = |count, text: usize, length| Image {
            number_of_frames: count,
            image_type: "x".repeat(text),
            is_native: true,
            pixel_length: length,
            ..Image::default()
        };
        let count = |image: &Image| frames(image, Source::Bytes(&[])).map(|found| found.len());
        assert!(matches!(count(&object(4096, 16, 4096 * 512)), Ok(4096)));
        // A frame for each bit, and a long text that each frame repeats.
        assert!(count(&object(1 << 20, 16, 1 << 17)).is_err());
        assert!(count(&object(4096, 1 << 16, 4096)).is_err());
    }

    #[test]
    fn all_frames_share_the_table_of_a_modality_lut() {
        let inner = Writer::new(EXPLICIT)
            .put(0x0028_3002, "US", &[2, 0, 0, 0, 16, 0])
            .put(0x0028_3006, "OW", &[1, 0, 2, 0]);
        let object = Writer::new(EXPLICIT)
            .text(0x0028_0008, "IS", "2")
            .sequence(0x0028_3000, "SQ", &inner, true)
            .lie(0x7FE0_0010, "OW", 24, &[0; 24])
            .part10(EXPLICIT);
        let source = Source::Bytes(&object);
        let found = frames(&scan_image(source, &mut Vec::new()).unwrap(), source).unwrap();
        let table = |k: usize| found[k].table(source).unwrap().unwrap();
        assert!(Arc::ptr_eq(&table(0), &table(1)));
        assert_eq!(table(0).values, [1.0, 2.0]);
    }
}
