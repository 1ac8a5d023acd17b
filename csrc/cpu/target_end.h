// Closes what target_begin.h opened.
}  // namespace w2s::<target>
#if W2S_COPY == 512 || W2S_COPY == 2 || (W2S_COPY == 64 && W2S_TARGETS != 1)
W2S_TARGET_END
#endif
