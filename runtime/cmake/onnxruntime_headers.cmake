# onnxruntime's wheels carry no headers. The amd-quark wheel (MIT) carries those of ONNX Runtime 1.17 (MIT), which later versions
# can load. It is unpacked in the build folder, never installed.
set(version 0.13)
set(sha256 3b3e58a4cbbcff20d27815b641aa4de4d698efde3c782306cb4a6a05bcf55c8c)
set(folder ${CMAKE_BINARY_DIR}/onnxruntime_headers)
set(wheel ${folder}/amd_quark-${version}-py3-none-any.whl)
set(headers quark/onnx/operators/custom_ops/include/onnxruntime-1.17.0)
set(advice "or give the folder of onnxruntime_c_api.h: -C cmake.define.ORT_INCLUDE_DIR=FOLDER, or no library: -C wheel.cmake=false")

if(NOT EXISTS ${wheel})
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -m pip download --quiet --no-deps --only-binary :all: --disable-pip-version-check
            --dest ${folder} amd-quark==${version}
    RESULT_VARIABLE failed
    ERROR_VARIABLE message)
  if(failed)
    message(FATAL_ERROR "pip could not download the ONNX Runtime headers (amd-quark ${version}): ${message}\nTry again, ${advice}")
  endif()
endif()
file(SHA256 ${wheel} found)
if(NOT found STREQUAL sha256)
  file(REMOVE ${wheel})
  message(FATAL_ERROR "${wheel} has SHA-256 ${found}, expected ${sha256}\nTry again, ${advice}")
endif()
file(ARCHIVE_EXTRACT INPUT ${wheel} DESTINATION ${folder} PATTERNS "${headers}/*")
set(ORT_INCLUDE_DIR ${folder}/${headers}/onnxruntime/core/session)
