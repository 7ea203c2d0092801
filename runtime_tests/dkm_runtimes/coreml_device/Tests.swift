// Written by `dkm check --device-test`, which writes it anew: do not edit.

import CoreML
import CoreVideo
import Foundation
import XCTest

/// Runs the samples on each choice of compute units, and compares with what PyTorch computed by the
/// measures and limits of `dkm check`. Which unit computes an operation is up to Core ML.
final class __PREFIX__Tests: XCTestCase {
    func testAllUnits() throws { try check(.all, "all units") }
    func testCPUOnly() throws { try check(.cpuOnly, "the CPU") }
    func testCPUAndGPU() throws { try check(.cpuAndGPU, "CPU and GPU") }
    func testCPUAndNeuralEngine() throws { try check(.cpuAndNeuralEngine, "CPU and Neural Engine") }

    private func check(_ units: MLComputeUnits, _ place: String) throws {
        let samples = try Samples(bundle: Bundle(for: Self.self))
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        let model = try MLModel(contentsOf: samples.modelURL(), configuration: configuration)
        let results = try (0..<samples.layout.count).map { try predict(model, samples, $0) }
        let limits = samples.layout.limits
        for output in samples.layout.outputs {
            let pairs = try results.enumerated().map { index, result in
                Pair(
                    expected: try samples.expected(output, index),
                    actual: try scalars(of: result, output)
                )
            }
            let broken = Self.violations(of: pairs, limits)
            XCTAssert(
                broken.isEmpty,
                "\(output.name) on \(place): \(broken.joined(separator: "; ")); "
                    + "the worst is sample \(Self.worst(of: pairs))"
            )
            // Negative control: a comparison that overlooks a wrong value says nothing.
            XCTAssertFalse(
                Self.violations(of: Self.withOneWrongValue(pairs), limits).isEmpty,
                "\(output.name) on \(place): the comparison overlooks a wrong value"
            )
        }
    }

    private func predict(
        _ model: MLModel, _ samples: Samples, _ index: Int
    ) throws -> MLFeatureProvider {
        var features: [String: MLFeatureValue] = [:]
        for input in samples.layout.inputs {
            features[input.name] = try samples.feature(input, index)
        }
        return try model.prediction(from: MLDictionaryFeatureProvider(dictionary: features))
    }

    private func scalars(of result: MLFeatureProvider, _ output: Tensor) throws -> [Double] {
        let array = try XCTUnwrap(
            result.featureValue(for: output.name)?.multiArrayValue,
            "the model has no output '\(output.name)' that is an array"
        )
        XCTAssertEqual(array.shape.map { $0.intValue }, output.shape, "shape of \(output.name)")
        return MLShapedArray<Double>(converting: array).scalars
    }
}

// MARK: - Samples

extension __PREFIX__Tests {
    private struct Layout: Decodable {
        let model: String
        let count: Int
        let limits: Limits
        let inputs: [Tensor]
        let outputs: [Tensor]
    }

    private struct Tensor: Decodable {
        enum Kind: String, Decodable {
            case float32
            case int32
            /// Bytes: `[height, width, 4]` of blue, green, red, alpha, or `[height, width, 1]`.
            case image
        }

        let name: String
        let kind: Kind
        let shape: [Int]
        /// In bytes, of the first sample in the file of values; the others follow it.
        let offset: Int
    }

    private struct Problem: Error, CustomStringConvertible {
        let description: String
    }

    private struct Samples {
        let layout: Layout
        private let values: Data
        private let bundle: Bundle

        init(bundle: Bundle) throws {
            self.bundle = bundle
            layout = try JSONDecoder().decode(Layout.self, from: Self.file("json", in: bundle))
            values = try Self.file("bin", in: bundle)
        }

        /// The compiled model, in the bundle of the tests or of the app that hosts them.
        func modelURL() throws -> URL {
            let found = [bundle, Bundle.main].compactMap {
                $0.url(forResource: layout.model, withExtension: "mlmodelc")
            }
            return try XCTUnwrap(
                found.first,
                "\(layout.model).mlpackage is neither in the target of the app nor of the tests"
            )
        }

        func feature(_ input: Tensor, _ index: Int) throws -> MLFeatureValue {
            switch input.kind {
            case .float32:
                let scalars = read(Float.self, input, index)
                let array = MLShapedArray<Float>(scalars: scalars, shape: input.shape)
                return MLFeatureValue(multiArray: MLMultiArray(array))
            case .int32:
                let scalars = read(Int32.self, input, index)
                let array = MLShapedArray<Int32>(scalars: scalars, shape: input.shape)
                return MLFeatureValue(multiArray: MLMultiArray(array))
            case .image:
                return MLFeatureValue(pixelBuffer: try pixelBuffer(input, index))
            }
        }

        func expected(_ output: Tensor, _ index: Int) throws -> [Double] {
            switch output.kind {
            case .float32: return read(Float.self, output, index).map { Double($0) }
            case .int32: return read(Int32.self, output, index).map { Double($0) }
            case .image: throw Problem(description: "output '\(output.name)' is an image")
            }
        }

        private static func file(_ suffix: String, in bundle: Bundle) throws -> Data {
            let name = "__PREFIX__Samples"
            let url = try XCTUnwrap(
                bundle.url(forResource: name, withExtension: suffix),
                "\(name).\(suffix) is not in the target of the tests"
            )
            return try Data(contentsOf: url)
        }

        /// The values are little-endian, as all of Apple's systems are.
        private func read<Scalar>(_ type: Scalar.Type, _ tensor: Tensor, _ index: Int) -> [Scalar] {
            let stride = MemoryLayout<Scalar>.stride
            let count = tensor.shape.reduce(1, *)
            let start = tensor.offset + index * count * stride
            return [Scalar](unsafeUninitializedCapacity: count) { buffer, initialized in
                let bytes = values.copyBytes(to: buffer, from: start..<start + count * stride)
                initialized = bytes / stride
            }
        }

        private func pixelBuffer(_ input: Tensor, _ index: Int) throws -> CVPixelBuffer {
            let (height, width, channels) = (input.shape[0], input.shape[1], input.shape[2])
            let format =
                channels == 1 ? kCVPixelFormatType_OneComponent8 : kCVPixelFormatType_32BGRA
            var created: CVPixelBuffer?
            CVPixelBufferCreate(kCFAllocatorDefault, width, height, format, nil, &created)
            let buffer = try XCTUnwrap(created, "no pixel buffer for input '\(input.name)'")
            CVPixelBufferLockBaseAddress(buffer, [])
            defer { CVPixelBufferUnlockBaseAddress(buffer, []) }
            let base = try XCTUnwrap(
                CVPixelBufferGetBaseAddress(buffer),
                "the pixel buffer for input '\(input.name)' has no memory"
            )
            let bytes = read(UInt8.self, input, index)
            let size = width * channels
            for row in 0..<height {
                // A row of the buffer may be longer than the image is wide.
                let start = base.advanced(by: row * CVPixelBufferGetBytesPerRow(buffer))
                UnsafeMutableRawBufferPointer(start: start, count: size)
                    .copyBytes(from: bytes[row * size..<(row + 1) * size])
            }
            return buffer
        }
    }
}

// MARK: - Comparison, as in dkm_export/checking/metrics.py

extension __PREFIX__Tests {
    private struct Limits: Decodable {
        let relativeL2: Double
        let rtol: Double
        let atol: Double
        let sqnrDB: Double
    }

    /// One output for one sample.
    private struct Pair {
        var expected: [Double]
        let actual: [Double]

        var errors: [Double] { zip(actual, expected).map { $0 - $1 } }
    }

    /// Which limits an output breaks over all samples, each with its figure and its limit.
    private static func violations(of pairs: [Pair], _ limits: Limits) -> [String] {
        let expected = pairs.flatMap { $0.expected }
        let actual = pairs.flatMap { $0.actual }
        guard actual.count == expected.count else {
            return ["\(actual.count) elements, expected \(expected.count)"]
        }
        let nonfinite = actual.filter { !$0.isFinite }.count
        guard nonfinite == 0 else {
            return ["\(nonfinite) elements are NaN or infinite"]
        }
        let errors = pairs.flatMap { $0.errors }
        let noise = norm(errors)
        let relative = noise == 0 ? 0 : noise / norm(expected)
        let sqnr = -20 * log10(relative)
        let largest = expected.reduce(0.0) { max($0, abs($1)) }
        let outside = zip(errors, expected).filter { error, reference in
            abs(error) > limits.atol * largest + limits.rtol * abs(reference)
        }
        var found: [String] = []
        if relative > limits.relativeL2 {
            found.append("relative L2 \(relative) exceeds \(limits.relativeL2)")
        }
        if !outside.isEmpty {
            found.append(
                "\(outside.count) elements differ by more than \(limits.rtol) relative + "
                    + "\(limits.atol) of the largest, \(largest)"
            )
        }
        if sqnr < limits.sqnrDB {
            found.append("SQNR \(sqnr) dB is below \(limits.sqnrDB) dB")
        }
        return found
    }

    private static func worst(of pairs: [Pair]) -> Int {
        pairs.indices.max { norm(pairs[$0].errors) < norm(pairs[$1].errors) } ?? 0
    }

    private static func withOneWrongValue(_ pairs: [Pair]) -> [Pair] {
        var changed = pairs
        let largest = pairs.flatMap { $0.expected }.reduce(0.0) { max($0, abs($1)) }
        changed[0].expected[0] += 2 * largest + 1
        return changed
    }

    private static func norm(_ values: [Double]) -> Double {
        values.reduce(0.0) { $0 + $1 * $1 }.squareRoot()
    }
}
