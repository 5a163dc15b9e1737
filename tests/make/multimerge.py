"""`mergekit-multi` where the method is registered, as after `phlora mergekit enable`."""

from mergekit.scripts.multimerge import main

from mergekit_plugin import register

register()
main()
