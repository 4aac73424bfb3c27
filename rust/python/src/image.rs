//! `Image`, `scan_images`, `load` and `stack`.

use std::borrow::Cow;
use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;

use dicomnode_core::folder::{self, Found};
use dicomnode_core::pixels::{Lut, Value};
use dicomnode_core::source::Source;
use dicomnode_core::stack::{Matrix, Reading, Slice};
use dicomnode_core::{Error, image as core};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::{detached, exception};
use crate::memory::{Dtype, Out, Owner};

/// Files that are scanned before a signal such as Ctrl-C is looked at.
const INTERRUPTIBLE: usize = 1024;

/// Path and image of an object.
type Loaded = (OsString, Option<Image>);

/// What stacking needs to know of one single-frame or multi-frame image, and its source.
#[pyclass(frozen, module = "dicomnode._core")]
pub struct Image {
    image: core::Image,
    owner: Arc<Owner>,
}

#[pymethods]
impl Image {
    /// An image from pixel bytes in memory (borrowed, C-contiguous, one frame, one sample).
    ///
    /// Native pixels, or with the UID of an encapsulated `transfer_syntax` the items of PixelData.
    /// With `big_endian`, 16 and 32 bit cells are big endian; 8 bit cells are in order in any case.
    #[new]
    #[pyo3(signature = (
        pixels, *, rows, columns, bits_allocated, bits_stored, high_bit, pixel_representation,
        slope = 1.0, intercept = 0.0, big_endian = false, sop_instance_uid = "",
        transfer_syntax = ""
    ))]
    #[expect(
        clippy::too_many_arguments,
        reason = "each is an attribute, given by name"
    )]
    fn new(
        py: Python<'_>,
        pixels: &Bound<'_, PyAny>,
        rows: u32,
        columns: u32,
        bits_allocated: u32,
        bits_stored: u32,
        high_bit: u32,
        pixel_representation: u32,
        slope: f64,
        intercept: f64,
        big_endian: bool,
        sop_instance_uid: &str,
        transfer_syntax: &str,
    ) -> PyResult<Self> {
        let owner = Arc::new(Owner::of_pixels(pixels)?);
        let found = owner.bytes(py).unwrap_or_default().len() as u64;
        // Below 2^96, and so is the length.
        let bits = u128::from(rows) * u128::from(columns) * u128::from(bits_allocated);
        let expected = bits.div_ceil(8);
        let is_native = transfer_syntax.is_empty();
        if is_native && u128::from(found) < expected {
            let message = format!("expected at least {expected} bytes of pixels, found {found}");
            return Err(exception(py, Error::invalid(message).of(sop_instance_uid)));
        }
        let image = core::Image {
            sop_instance_uid: sop_instance_uid.to_owned(),
            rows,
            columns,
            samples_per_pixel: 1,
            bits_allocated,
            bits_stored,
            high_bit,
            pixel_representation,
            number_of_frames: 1,
            slope,
            intercept,
            pixel_tag: dicomnode_core::scan::PIXEL_DATA,
            transfer_syntax: transfer_syntax.to_owned(),
            is_native,
            is_encapsulated: !is_native,
            pixel_length: found,
            big_endian_pixels: big_endian,
            ..core::Image::default()
        };
        Ok(Image { image, owner })
    }

    /// The same image with other values: `stored * slope + intercept`, or those of a table.
    ///
    /// `values[k]` is what the stored value `first + k` means; those below and above mean what the
    /// first and the last do.
    #[pyo3(signature = (slope, intercept, *, first = 0, values = None))]
    fn with_values(
        &self,
        slope: f64,
        intercept: f64,
        first: i64,
        values: Option<Vec<f64>>,
    ) -> Image {
        let lut = values.map(|values| Arc::new(Lut { first, values }));
        let image = core::Image {
            slope,
            intercept,
            has_rescale: true,
            modality_lut: None,
            lut,
            ..self.image.clone()
        };
        let owner = Arc::clone(&self.owner);
        Image { image, owner }
    }

    /// One Image for each frame, in the order of the file, with what functional groups say of it.
    fn frames(&self, py: Python<'_>) -> PyResult<Vec<Image>> {
        let source = self.owner.source(py);
        let frames = detached(py, || core::frames(&self.image, source))?;
        let owned = |image| Image {
            image,
            owner: Arc::clone(&self.owner),
        };
        Ok(frames.into_iter().map(owned).collect())
    }

    /// Which frame of its object this is, from 0.
    #[getter]
    fn frame(&self) -> u32 {
        self.image.frame
    }

    /// Stack ID of the frame, empty where absent.
    #[getter]
    fn stack_id(&self) -> &str {
        &self.image.stack_id
    }

    /// Which slice of its stack the frame says it is, None where it does not.
    #[getter]
    fn position_index(&self) -> Option<u32> {
        self.image.position_index
    }

    /// VR (empty where the encoding has none) and raw value of a tag that `scan_images` was asked for.
    fn element(&self, tag: u32) -> Option<(String, Cow<'_, [u8]>)> {
        let extra = self.image.extra.iter().find(|extra| extra.tag == tag)?;
        let vr = match extra.vr {
            [0, 0] => String::new(),
            vr => String::from_utf8_lossy(&vr).into_owned(),
        };
        Some((vr, Cow::Borrowed(&extra.value)))
    }

    /// The values of the dataset are big endian.
    #[getter]
    fn big_endian(&self) -> bool {
        self.image.big_endian
    }

    #[getter]
    fn sop_class_uid(&self) -> &str {
        &self.image.sop_class_uid
    }

    #[getter]
    fn sop_instance_uid(&self) -> &str {
        &self.image.sop_instance_uid
    }

    #[getter]
    fn study_instance_uid(&self) -> &str {
        &self.image.study_instance_uid
    }

    #[getter]
    fn series_instance_uid(&self) -> &str {
        &self.image.series_instance_uid
    }

    #[getter]
    fn frame_of_reference_uid(&self) -> &str {
        &self.image.frame_of_reference_uid
    }

    #[getter]
    fn transfer_syntax(&self) -> &str {
        &self.image.transfer_syntax
    }

    #[getter]
    fn modality(&self) -> &str {
        &self.image.modality
    }

    /// The whole value, backslash between the values, as in the file.
    #[getter]
    fn image_type(&self) -> &str {
        &self.image.image_type
    }

    #[getter]
    fn photometric_interpretation(&self) -> &str {
        &self.image.photometric_interpretation
    }

    /// 0 where absent; likewise the other integers unless told otherwise.
    #[getter]
    fn rows(&self) -> u32 {
        self.image.rows
    }

    #[getter]
    fn columns(&self) -> u32 {
        self.image.columns
    }

    /// 1 where absent.
    #[getter]
    fn samples_per_pixel(&self) -> u32 {
        self.image.samples_per_pixel
    }

    /// 0 where absent.
    #[getter]
    fn planar_configuration(&self) -> u32 {
        self.image.planar_configuration
    }

    #[getter]
    fn bits_allocated(&self) -> u32 {
        self.image.bits_allocated
    }

    /// BitsAllocated where absent.
    #[getter]
    fn bits_stored(&self) -> u32 {
        self.image.bits_stored
    }

    /// BitsStored - 1 where absent.
    #[getter]
    fn high_bit(&self) -> u32 {
        self.image.high_bit
    }

    #[getter]
    fn pixel_representation(&self) -> u32 {
        self.image.pixel_representation
    }

    /// 1 where absent, empty or 0.
    #[getter]
    fn number_of_frames(&self) -> u32 {
        self.image.number_of_frames
    }

    #[getter]
    fn has_rescale(&self) -> bool {
        self.image.has_rescale
    }

    /// Rescale Slope, 1.0 where absent.
    #[getter]
    fn slope(&self) -> f64 {
        self.image.slope
    }

    #[getter]
    fn intercept(&self) -> f64 {
        self.image.intercept
    }

    /// What rescaled values are measured in, such as HU or BQML; empty where the object does not say.
    #[getter]
    fn units(&self) -> &str {
        &self.image.units
    }

    /// Image Position (Patient), mm.
    #[getter]
    fn position(&self) -> Option<(f64, f64, f64)> {
        self.image.position.map(|[x, y, z]| (x, y, z))
    }

    /// Image Orientation (Patient).
    #[getter]
    fn orientation(&self) -> Option<(f64, f64, f64, f64, f64, f64)> {
        self.image
            .orientation
            .map(|[a, b, c, d, e, f]| (a, b, c, d, e, f))
    }

    /// Pixel Spacing, mm: between rows, between columns.
    #[getter]
    fn pixel_spacing(&self) -> Option<(f64, f64)> {
        self.image
            .pixel_spacing
            .map(|[rows, columns]| (rows, columns))
    }

    #[getter]
    fn slice_thickness(&self) -> Option<f64> {
        self.image.slice_thickness
    }

    #[getter]
    fn spacing_between_slices(&self) -> Option<f64> {
        self.image.spacing_between_slices
    }

    #[getter]
    fn instance_number(&self) -> Option<i64> {
        self.image.instance_number
    }

    /// A Modality LUT Sequence (0028,3000) is present.
    #[getter]
    fn has_modality_lut(&self) -> bool {
        self.image.modality_lut.is_some()
    }

    /// (5200,9229) or (5200,9230) is present.
    #[getter]
    fn has_functional_groups(&self) -> bool {
        self.image.has_functional_groups
    }

    /// 0x7FE00010, 0x7FE00008 or 0x7FE00009; 0 without pixel data.
    #[getter]
    fn pixel_tag(&self) -> u32 {
        self.image.pixel_tag
    }

    /// The pixel data is uncompressed.
    #[getter]
    fn is_native(&self) -> bool {
        self.image.is_native
    }
}

/// Scan many objects in parallel with the GIL released; order and length as given.
///
/// An Image stands for its source, and is returned itself unless its file was changed since or it
/// was scanned for other tags.
///
/// Raises InvalidDicom or OSError for the first source that cannot be read; the message names it
/// by SOPInstanceUID where known, else by its place in the list. The images keep the values of
/// `extra_tags`, and so do their frames, wherever in the functional groups these lie.
#[pyfunction]
#[pyo3(signature = (sources, extra_tags = Vec::new()))]
pub fn scan_images<'py>(
    py: Python<'py>,
    sources: Vec<Bound<'py, PyAny>>,
    extra_tags: Vec<u32>,
) -> PyResult<Vec<Bound<'py, Image>>> {
    let owners: Vec<Arc<Owner>> = sources
        .iter()
        .map(|source| match source.cast::<Image>() {
            Ok(image) => Ok(Arc::clone(&image.get().owner)),
            Err(_) => Owner::of_source(source).map(Arc::new),
        })
        .collect::<PyResult<_>>()?;
    let given: Vec<(Source<'_>, Option<&core::Image>)> = sources
        .iter()
        .zip(&owners)
        .map(|(source, owner)| {
            let known = source.cast::<Image>().ok();
            (owner.source(py), known.map(|known| &known.get().image))
        })
        .collect();
    let scanned = detached(py, || core::scan_changed(&given, &extra_tags))?;
    scanned
        .into_iter()
        .zip(&sources)
        .zip(owners)
        .map(|((scanned, source), owner)| match scanned {
            Some(image) => Bound::new(py, Image { image, owner }),
            None => Ok(source.cast::<Image>()?.clone()),
        })
        .collect()
}

/// The objects in files, and in folders and everything below them; and the files left out.
///
/// An object is its path and its Image, None where that has to be scanned when it is needed.
///
/// Raises InvalidDicom for a damaged object, or OSError.
#[pyfunction]
#[pyo3(signature = (paths, extra_tags = Vec::new()))]
pub fn load(
    py: Python<'_>,
    paths: Vec<OsString>,
    extra_tags: Vec<u32>,
) -> PyResult<(Vec<Loaded>, Vec<OsString>)> {
    let (mut objects, mut others) = (Vec::new(), Vec::new());
    let mut files = Vec::new();
    for path in paths {
        py.check_signals()?;
        files.extend(detached(py, || folder::candidates(Path::new(&path)))?);
    }
    for part in files.chunks(INTERRUPTIBLE) {
        py.check_signals()?;
        let found = detached(py, || folder::scan_files(part, &extra_tags))?;
        for (file, found) in part.iter().zip(found) {
            let path = file.path.clone();
            match found {
                Found::Image(image) => {
                    let owner = Arc::new(Owner::Path(path.clone()));
                    let image = Image {
                        image: *image,
                        owner,
                    };
                    objects.push((path.into(), Some(image)));
                }
                Found::Object => objects.push((path.into(), None)),
                Found::Other => others.push(path.into()),
                Found::Directory => {}
            }
        }
    }
    Ok((objects, others))
}

/// Write the pixels of `images[k]` to `out[k]`, in parallel over images, the GIL released.
///
/// `out` has shape (len(images), rows, columns), or with a fourth axis of as many samples as the
/// images have; it is C-contiguous and writeable; dtype float32, float64, or an 8, 16 or 32 bit
/// integer. Stored values are shifted by HighBit, masked to BitsStored and sign-extended, then, with
/// `rescale`, looked up in the Modality LUT where there is one, or stored * slope + intercept is
/// computed in float64 and rounded once to `out`'s dtype (PS3.3 C.11.1).
///
/// Samples lie one pixel after the other, whatever PlanarConfiguration says; with `rgb`, YBR_FULL
/// becomes RGB. Compressed frames are decoded first. Returns a text for each image whose codestream
/// contradicts its header, or whose pixel data goes on after the last pixel.
///
/// Raises UnsupportedImage where BitsAllocated is not 1, 8, 16 or 32, or a transfer syntax is not
/// decoded; InvalidDicom where pixel data is damaged or shorter than Rows x Columns ask, or
/// Rows/Columns/SamplesPerPixel differ from `out`, or bits are contradictory; InvalidDataset where an
/// integer dtype cannot hold a rescaled value exactly, or a codestream has another size than its
/// header; OSError. On an error `out` is undefined.
#[pyfunction]
#[pyo3(signature = (images, out, rescale = true, rgb = true))]
pub fn stack(
    py: Python<'_>,
    images: Vec<Bound<'_, Image>>,
    out: &Bound<'_, PyAny>,
    rescale: bool,
    rgb: bool,
) -> PyResult<Vec<String>> {
    let out = Out::new(out)?;
    if out.slices != images.len() {
        return Err(PyValueError::new_err(format!(
            "expected out for {} images, found one for {}",
            images.len(),
            out.slices
        )));
    }
    let slices: Vec<Slice<'_>> = images
        .iter()
        .map(Bound::get)
        .map(|image| Slice {
            image: &image.image,
            source: image.owner.source(py),
        })
        .collect();
    for slice in &slices {
        if let Source::Bytes(bytes) = slice.source
            && out.overlaps(bytes)
        {
            return Err(PyValueError::new_err(
                "expected out apart from the pixels, found overlap",
            ));
        }
    }
    let reading = Reading { rescale, rgb };
    match out.dtype {
        Dtype::Float32 => fill::<f32>(py, &slices, out, reading),
        Dtype::Float64 => fill::<f64>(py, &slices, out, reading),
        Dtype::Int8 => fill::<i8>(py, &slices, out, reading),
        Dtype::Uint8 => fill::<u8>(py, &slices, out, reading),
        Dtype::Int16 => fill::<i16>(py, &slices, out, reading),
        Dtype::Uint16 => fill::<u16>(py, &slices, out, reading),
        Dtype::Int32 => fill::<i32>(py, &slices, out, reading),
        Dtype::Uint32 => fill::<u32>(py, &slices, out, reading),
    }
}

/// `out.dtype` names `T`, and `out` overlaps no source.
fn fill<T: Value>(
    py: Python<'_>,
    slices: &[Slice<'_>],
    mut out: Out,
    reading: Reading,
) -> PyResult<Vec<String>> {
    let matrix = Matrix {
        rows: out.rows,
        columns: out.columns,
        samples: out.samples,
    };
    // SAFETY: `stack`, the only caller, picked `T` by `out.dtype` and refused overlap.
    let values = unsafe { out.as_mut_slice::<T>() };
    detached(py, || {
        dicomnode_core::stack::stack(slices, matrix, values, reading)
    })
}
