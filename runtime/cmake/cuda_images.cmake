# The compiled GPU kernels (python -m bdq_runtime.gpu.build makes the archive), embedded by csrc/cuda/images.cc.
set(archive ${CMAKE_CURRENT_SOURCE_DIR}/bdq_runtime/gpu/images/images.tar.xz)
set(folder ${CMAKE_CURRENT_BINARY_DIR}/cuda_images)
file(ARCHIVE_EXTRACT INPUT ${archive} DESTINATION ${folder})
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${archive})
set_source_files_properties(${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/images.cc PROPERTIES
  COMPILE_DEFINITIONS "BDQ_IMAGES=\"${folder}\""
  INCLUDE_DIRECTORIES ${folder}
  OBJECT_DEPENDS "${folder}/images.bin;${folder}/images.inc")
