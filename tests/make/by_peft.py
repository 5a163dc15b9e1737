"""What PEFT makes of an adapter."""

import peft
import torch


def by_peft(folder, model, **settings):
    options = {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) / 8)
    adapted.save_pretrained(folder)
    return folder
